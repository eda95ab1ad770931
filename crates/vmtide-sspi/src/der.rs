//! The little of DER (X.690) that is needed: elements one by one, and the token within SPNEGO.

/// One element: its tag, its content, and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node<'a> {
    /// The tag, with its class.
    pub tag: u8,
    /// What is in it.
    pub content: &'a [u8],
    /// What stands behind it.
    pub rest: &'a [u8],
}

/// The tag of a sequence.
pub const SEQUENCE: u8 = 0x30;
/// The tag of an object identifier.
pub const OBJECT_ID: u8 = 0x06;
const OCTETS: u8 = 0x04;

/// Reads an element with a short tag and a length of up to four bytes; none where it is not whole.
pub fn read(bytes: &[u8]) -> Option<Node<'_>> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let length = digits.iter().try_fold(0_usize, |length, byte| {
                length.checked_mul(256)?.checked_add(usize::from(*byte))
            })?;
            (length, rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    (tag & 0x1f != 0x1f).then_some(Node { tag, content, rest })
}

/// Reads an element of that tag; none where another stands there.
pub fn expect(bytes: &[u8], tag: u8) -> Option<Node<'_>> {
    read(bytes).filter(|node| node.tag == tag)
}

/// The mechanism's own token: of an answer of SPNEGO (RFC 4178 4.2.2, `NegTokenResp`) the one within, of anything
/// else the thing itself. Empty where an answer of SPNEGO has none.
pub fn mechanism_token(token: &[u8]) -> &[u8] {
    const RESPONSE: u8 = 0xa1;
    const RESPONSE_TOKEN: u8 = 0xa2;
    let Some(response) = expect(token, RESPONSE) else { return token };
    let Some(fields) = expect(response.content, SEQUENCE) else { return &[] };
    let mut rest = fields.content;
    while let Some(field) = read(rest) {
        if field.tag == RESPONSE_TOKEN {
            return expect(field.content, OCTETS).map_or(&[], |octets| octets.content);
        }
        rest = field.rest;
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_held_against_what_is_there() {
        assert_eq!(read(&[4, 2, 1, 2, 9]).unwrap().rest, [9]);
        assert_eq!(read(&[4, 0x82, 0, 1, 7]).unwrap().content, [7]);
        for bad in [
            &[][..],
            &[4],
            &[4, 1],
            &[4, 0x80],
            &[4, 0x85, 0, 0, 0, 0, 0],
            &[4, 0x84, 0xff, 0xff, 0xff, 0xff],
            &[0x1f, 0],
        ] {
            assert!(read(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn tokens_come_out_of_spnego() {
        assert_eq!(mechanism_token(b"NTLMSSP\0..."), b"NTLMSSP\0...");
        // accept-incomplete, the mechanism, the token
        let wrapped =
            [0xa1, 0x0e, 0x30, 0x0c, 0xa0, 3, 0x0a, 1, 1, 0xa2, 5, 0x04, 3, b'a', b'b', b'c'];
        assert_eq!(mechanism_token(&wrapped), b"abc");
        assert_eq!(mechanism_token(&[0xa1, 7, 0x30, 5, 0xa0, 3, 0x0a, 1, 0]), b"");
        assert_eq!(mechanism_token(&[0xa1, 0]), b"");
    }
}
