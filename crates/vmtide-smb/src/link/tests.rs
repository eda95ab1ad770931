//! Connections to servers that no real one is on demand: a stand-in that says on the wire exactly what a test tells it to.

use super::*;
use crate::crypto::{Encryption, PreauthHash};
use std::net::TcpListener;
use std::thread::JoinHandle;

const SESSION: u64 = 7;
const KEY: [u8; 32] = [9; 32];

/// How long a request may take here. Much longer than a stand-in needs, so that a slow machine changes nothing.
const TIME: Duration = Duration::from_millis(700);

/// The server's end of a connection.
struct Server {
    stream: TcpStream,
    cipher: Option<Cipher>,
}

/// What a client asked.
struct Asked {
    command: u16,
    message_id: u64,
}

impl Server {
    /// The next request.
    fn next(&mut self) -> Asked {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).unwrap();
        let mut frame = vec![0; usize::try_from(u32::from_be_bytes(head)).unwrap()];
        self.stream.read_exact(&mut frame).unwrap();
        let start = self.cipher.as_ref().map_or(0, |cipher| {
            cipher.open(&mut frame, SESSION).unwrap();
            TRANSFORM_BYTES
        });
        let at = |from: usize, to: usize| &frame[start + from..start + to];
        Asked {
            command: u16::from_le_bytes(at(12, 14).try_into().unwrap()),
            message_id: u64::from_le_bytes(at(24, 32).try_into().unwrap()),
        }
    }

    /// An answer with one credit; encrypted where the session is, unless `is_plain`.
    fn say(&mut self, to: &Asked, status: u32, flags: u32, body: &[u8], is_plain: bool) {
        let cipher = self.cipher.as_ref().filter(|_| !is_plain);
        let start = if cipher.is_some() { TRANSFORM_BYTES } else { 0 };
        let mut writer = Writer::default();
        writer.zeros(start).bytes(b"\xfeSMB").u16(64).u16(1).u32(status).u16(to.command).u16(1);
        writer.u32(crate::header::FLAG_RESPONSE | flags).u32(0).u64(to.message_id);
        writer.u64(0).u64(SESSION).zeros(16).bytes(body);
        let mut frame = writer.0;
        if let Some(cipher) = cipher {
            cipher.seal(&mut frame, start, SESSION).unwrap();
        }
        let length = u32::try_from(frame.len()).unwrap();
        let sent = self.stream.write_all(&length.to_be_bytes());
        drop(sent.and_then(|()| self.stream.write_all(&frame)));
    }

    fn answer(&mut self, to: &Asked, status: u32, body: &[u8]) {
        self.say(to, status, 0, body, false);
    }

    fn say_that_it_is_at_it(&mut self, asked: &Asked) {
        self.say(asked, status::PENDING, FLAG_ASYNC, &[9, 0, 0, 0, 0, 0, 0, 0], false);
    }
}

/// A client's end, and a server that does as `script` says, and closes when it is joined and dropped.
fn connected(
    is_encrypted: bool,
    script: impl FnOnce(&mut Server) + Send + 'static,
) -> (Link, JoinHandle<Server>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let link = Link::start(stream, "hv1:445".into(), TIME).unwrap();
    let (encryption, preauth) = (Encryption::Aes128Gcm, PreauthHash::new());
    let cipher = is_encrypted.then(|| Cipher::of_server(encryption, &KEY, &preauth).unwrap());
    if is_encrypted {
        link.secure(Security {
            session_id: SESSION,
            signer: Signer::new(crate::crypto::Signing::Gmac, &KEY[..16], &preauth).unwrap(),
            cipher: Some(Cipher::new(encryption, &KEY, &preauth).unwrap()),
        });
    }
    let mut server = Server { stream: far, cipher };
    let script = move || {
        script(&mut server);
        server
    };
    (link, std::thread::spawn(script))
}

fn flush(link: &Link) -> Result<Reply> {
    link.call(&Request {
        command: Command::Flush,
        tree_id: 1,
        body: &[24, 0],
        data: &[],
        payload_bytes: 0,
    })
}

/// What a server in an encrypted session answers to a flush, the link after it, and whether it was broken.
fn after(code: u32, is_plain: bool) -> (Result<Reply>, Link, bool) {
    let (link, server) = connected(true, move |server| {
        let asked = server.next();
        server.say(&asked, code, 0, &[9, 0], is_plain);
    });
    let answer = flush(&link);
    // It would be broken by its end, too.
    let is_broken = link.is_broken();
    server.join().unwrap();
    (answer, link, is_broken)
}

/// Whoever comes next gets another session, also where the answer itself was encrypted.
#[test]
fn a_session_that_has_ended_is_not_used_again() {
    for (code, is_plain, words) in [
        (status::USER_SESSION_DELETED, false, "ended the session"),
        (status::USER_SESSION_DELETED, true, "ended the session"),
        (status::NETWORK_SESSION_EXPIRED, true, "ticket has expired"),
    ] {
        let (answer, _, is_broken) = after(code, is_plain);
        let error = answer.err().unwrap();
        assert!(error.is_connection_lost() && error.to_string().contains(words), "{error}");
        assert!(is_broken, "{code:#x}");
    }
}

/// The connection stays, for a new ticket.
#[test]
fn a_session_whose_ticket_has_expired_waits_for_another() {
    let (answer, link, is_broken) = after(status::NETWORK_SESSION_EXPIRED, false);
    assert_eq!(answer.unwrap().header.status, status::NETWORK_SESSION_EXPIRED);
    assert!(link.is_expired() && !is_broken);
    link.renewed();
    assert!(!link.is_expired() && link.renewals() == 1);
    link.end("no other ticket was taken");
    assert!(link.is_broken());
}

#[test]
fn what_the_server_is_at_is_waited_for_while_it_lives() {
    let (link, server) = connected(true, |server| {
        let asked = server.next();
        server.say_that_it_is_at_it(&asked);
        for _ in 0..2 {
            let alive = server.next();
            assert_eq!(alive.command, Command::Echo as u16);
            server.answer(&alive, status::SUCCESS, &[4, 0, 0, 0]);
        }
        server.answer(&asked, status::SUCCESS, &[4, 0, 0, 0]);
    });
    assert_eq!(flush(&link).unwrap().header.status, status::SUCCESS);
    assert!(!link.is_broken());
    server.join().unwrap();
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    for says in [true, false] {
        let (link, server) = connected(true, move |server| {
            let asked = server.next();
            if says {
                server.say_that_it_is_at_it(&asked);
            }
            // Until the client has had enough.
            drop(server.stream.read_to_end(&mut Vec::new()));
        });
        let error = flush(&link).err().unwrap();
        assert!(matches!(error, SmbError::Timeout { .. }), "{says}: {error}");
        assert!(link.is_broken());
        server.join().unwrap();
    }
}

#[test]
fn nobody_else_says_that_the_server_is_at_it() {
    let (link, server) = connected(true, |server| {
        let asked = server.next();
        server.say(&asked, status::PENDING, FLAG_ASYNC, &[9, 0], true);
    });
    let error = flush(&link).err().unwrap();
    assert!(matches!(error, SmbError::Protocol { .. }), "{error}");
    server.join().unwrap();
}

#[test]
fn an_answer_is_no_larger_than_its_credits() {
    let of = |length: usize| {
        let (link, server) = connected(false, move |server| {
            let asked = server.next();
            server.answer(&asked, status::SUCCESS, &vec![0; length]);
        });
        let answer = flush(&link);
        let _open = server.join().unwrap();
        (answer, link.is_broken())
    };
    let (answer, is_broken) = of(64 << 10);
    assert!(answer.is_ok() && !is_broken);
    let (answer, is_broken) = of(1 << 20);
    assert!(matches!(answer, Err(SmbError::Protocol { .. })) && is_broken);
}

#[test]
fn large_buffers_are_not_kept() {
    let (link, server) = connected(false, |_| {});
    server.join().unwrap();
    for length in [4096, MAX_SPARE_BYTES + 1] {
        let frame = vec![0; length];
        let header = ResponseHeader {
            status: 0,
            credits: 0,
            flags: 0,
            message_id: 0,
            session_id: 0,
            tree_id: 0,
        };
        link.recycle(Reply { frame, start: 0, header, is_encrypted: false });
    }
    assert_eq!(link.shared.spare.lock().len(), 1);
}

/// A server that takes a little now and then holds nobody for ever: the whole message has one time.
#[test]
fn a_message_that_is_taken_too_slowly_ends_the_connection() {
    // It has megabytes to read when the test is over: nobody waits for it.
    let (link, _) = connected(false, |server| {
        let mut little = [0; 16 << 10];
        while matches!(server.stream.read(&mut little), Ok(1..)) {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    // At this pace it would take more than a minute.
    let error = link.shared.write(&vec![0; 64 << 20]).unwrap_err();
    assert!(matches!(error, SmbError::Timeout { .. }), "{error}");
    // Who comes meanwhile does not wait for longer either.
    let _held = link.shared.sending.lock();
    let error = link.shared.write(b"x").unwrap_err();
    assert!(matches!(error, SmbError::Timeout { .. }), "{error}");
}
