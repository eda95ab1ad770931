//! A server that says on the wire exactly what a test tells it to.

use super::*;
use crate::crypto::{Encryption, PreauthHash, Signing};
use std::net::TcpListener;
use std::thread::JoinHandle;

const SESSION: u64 = 7;
const KEY: [u8; 32] = [9; 32];

/// Much longer than a stand-in needs to answer, so that a slow machine changes nothing.
pub(crate) const AMPLE: Duration = Duration::from_secs(60);

/// The server's end of a connection.
pub(crate) struct Server {
    pub(crate) stream: TcpStream,
    cipher: Option<Cipher>,
    /// How many credits each answer gives.
    pub(crate) credits: u16,
}

/// What a client asked.
pub(crate) struct Asked {
    pub(crate) command: u16,
    message_id: u64,
    /// The message from its header on.
    pub(crate) message: Vec<u8>,
}

impl Server {
    /// The next request.
    pub(crate) fn next(&mut self) -> Asked {
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
            message: frame[start..].to_vec(),
        }
    }

    /// An answer; encrypted where the session is, unless `is_plain`.
    pub(crate) fn say(&mut self, to: &Asked, status: u32, flags: u32, body: &[u8], is_plain: bool) {
        let cipher = self.cipher.as_ref().filter(|_| !is_plain);
        let start = if cipher.is_some() { TRANSFORM_BYTES } else { 0 };
        let mut writer = Writer::default();
        writer.zeros(start).bytes(b"\xfeSMB").u16(64).u16(1).u32(status).u16(to.command);
        writer.u16(self.credits);
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

    pub(crate) fn answer(&mut self, to: &Asked, status: u32, body: &[u8]) {
        self.say(to, status, 0, body, false);
    }

    pub(crate) fn say_that_it_is_at_it(&mut self, asked: &Asked) {
        self.say(asked, status::PENDING, FLAG_ASYNC, &[9, 0, 0, 0, 0, 0, 0, 0], false);
    }
}

/// A client's end, and a server that does as `script` says, and closes when it is joined and dropped.
/// `timeout` is the client's for one request.
pub(crate) fn connected<T: Send + 'static>(
    is_encrypted: bool,
    timeout: Duration,
    script: impl FnOnce(&mut Server) -> T + Send + 'static,
) -> (Link, JoinHandle<(Server, T)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    // What a client never says ends the test.
    far.set_read_timeout(Some(AMPLE)).unwrap();
    let link = Link::start(stream, "hv1:445".into(), timeout).unwrap();
    let (encryption, preauth) = (Encryption::Aes128Gcm, PreauthHash::new());
    let cipher = is_encrypted.then(|| Cipher::of_server(encryption, &KEY, &preauth).unwrap());
    if is_encrypted {
        link.secure(Security {
            session_id: SESSION,
            signer: Signer::new(Signing::Gmac, &KEY[..16], &preauth).unwrap(),
            cipher: Some(Cipher::new(encryption, &KEY, &preauth).unwrap()),
        });
    }
    let mut server = Server { stream: far, cipher, credits: 1 };
    let script = move || {
        let told = script(&mut server);
        (server, told)
    };
    (link, std::thread::spawn(script))
}
