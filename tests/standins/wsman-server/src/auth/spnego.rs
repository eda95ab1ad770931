//! SPNEGO (RFC 4178) as far as a server needs it to offer NTLM: the first token, the answers, the list of mechanisms.
//! Kerberos within SPNEGO is left to MIT's library as a whole.

/// 1.3.6.1.5.5.2
const OID_SPNEGO: &[u8] = &[0x2b, 6, 1, 5, 5, 2];
/// 1.3.6.1.4.1.311.2.2.10
pub const OID_NTLM: &[u8] = &[0x2b, 6, 1, 4, 1, 0x82, 0x37, 2, 2, 10];

/// `negState` of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The login is complete.
    Completed = 0,
    /// More is to come.
    Incomplete = 1,
    /// More is to come, and the list of mechanisms must be signed.
    RequestMic = 3,
}

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
pub enum Token {
    /// The first one.
    Init {
        /// The list of mechanisms in DER, as it is signed later.
        list: Vec<u8>,
        /// The mechanisms.
        mechanisms: Vec<Vec<u8>>,
        /// The token of the first of them.
        token: Option<Vec<u8>>,
    },
    /// One that follows.
    Response {
        /// The mechanism's token.
        token: Option<Vec<u8>>,
        /// The signature over the list of mechanisms.
        mic: Option<Vec<u8>>,
    },
}

/// Reads a token; none where it is no SPNEGO.
pub fn read(bytes: &[u8]) -> Option<Token> {
    if bytes.first() == Some(&0x60) {
        let inner = Der(bytes).expect(0x60)?.0;
        let mut rest = Der(inner);
        if rest.take(0x06)? != OID_SPNEGO {
            return None;
        }
        let init = rest.expect(0xa0)?.expect(0x30)?;
        let mut init = init;
        let list = init.take(0xa0)?;
        let mut inner = Der(list).expect(0x30)?;
        let mut mechanisms = Vec::new();
        while !inner.0.is_empty() {
            mechanisms.push(inner.take(0x06)?.to_vec());
        }
        let _flags = init.optional(0xa1);
        let token = init.optional(0xa2).and_then(|token| Der(token).take(0x04).map(<[u8]>::to_vec));
        return Some(Token::Init { list: list.to_vec(), mechanisms, token });
    }
    let mut response = Der(bytes).expect(0xa1)?.expect(0x30)?;
    let _state = response.optional(0xa0);
    let _mechanism = response.optional(0xa1);
    let octets =
        |part: Option<&[u8]>| part.and_then(|part| Der(part).take(0x04).map(<[u8]>::to_vec));
    let token = octets(response.optional(0xa2));
    let mic = octets(response.optional(0xa3));
    Some(Token::Response { token, mic })
}

/// An answer.
pub fn respond(
    state: State,
    mechanism: Option<&[u8]>,
    token: Option<&[u8]>,
    mic: Option<&[u8]>,
) -> Vec<u8> {
    let mut fields = element(0xa0, &element(0x0a, &[state as u8]));
    if let Some(oid) = mechanism {
        fields.extend(element(0xa1, &element(0x06, oid)));
    }
    if let Some(token) = token {
        fields.extend(element(0xa2, &element(0x04, token)));
    }
    if let Some(mic) = mic {
        fields.extend(element(0xa3, &element(0x04, mic)));
    }
    element(0xa1, &element(0x30, &fields))
}

fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = content.len();
    match u8::try_from(length) {
        Ok(short) if short < 0x80 => out.push(short),
        _ => {
            let bytes: Vec<u8> =
                length.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect();
            out.push(0x80 | u8::try_from(bytes.len()).unwrap_or_default());
            out.extend(bytes);
        }
    }
    out.extend_from_slice(content);
    out
}

/// Elements of DER, one after the other.
#[derive(Clone, Copy)]
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The content of the next element, which must have that tag.
    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (&found, rest) = self.0.split_first()?;
        if found != tag {
            return None;
        }
        let (&first, mut rest) = rest.split_first()?;
        let mut length = usize::from(first);
        if first & 0x80 != 0 {
            let count = usize::from(first & 0x7f);
            if count == 0 || count > 4 {
                return None;
            }
            length = 0;
            for _ in 0..count {
                let (&byte, after) = rest.split_first()?;
                length = (length << 8) | usize::from(byte);
                rest = after;
            }
        }
        let content = rest.get(..length)?;
        self.0 = rest.get(length..)?;
        Some(content)
    }

    fn expect(mut self, tag: u8) -> Option<Self> {
        self.take(tag).map(Der)
    }

    fn optional(&mut self, tag: u8) -> Option<&'a [u8]> {
        if self.0.first() == Some(&tag) { self.take(tag) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_is_read_and_broken_ones_are_not() {
        let list = element(0x30, &element(0x06, OID_NTLM));
        let fields = [element(0xa0, &list), element(0xa2, &element(0x04, &[7; 200]))].concat();
        let init = element(0xa0, &element(0x30, &fields));
        let token = element(0x60, &[element(0x06, OID_SPNEGO), init].concat());
        let wanted =
            Token::Init { list, mechanisms: vec![OID_NTLM.to_vec()], token: Some(vec![7; 200]) };
        assert_eq!(read(&token), Some(wanted));
        for cut in 0..token.len() {
            assert_eq!(read(&token[..cut]), None);
        }
    }

    #[test]
    fn an_answer_is_read_back() {
        let answer = respond(State::RequestMic, Some(OID_NTLM), Some(b"t"), Some(b"m"));
        let wanted = Token::Response { token: Some(b"t".to_vec()), mic: Some(b"m".to_vec()) };
        assert_eq!(read(&answer), Some(wanted));
    }
}
