//! Tickets that end in the middle of something, at a stand-in that lets them end exactly there.

use super::{Server as Slot, *};
use crate::auth::{Login, Method};
use crate::error::status;
use crate::file::SmbFile;
use crate::header::{Command, HEADER_BYTES};
use crate::link::standin::{AMPLE, Asked, Server, connected};
use crate::wire::Writer;
use std::io::{ErrorKind, Read};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;
use vmtide_block::{BlockDevice, WritableBlockDevice};
use zeroize::Zeroizing;

const HOST: &str = "127.0.0.1";
/// The length of a piece, which is one request.
const PIECE: usize = 64 << 10;
/// Of the file that is open.
const SIZE: u64 = 1 << 20;

impl Server {
    fn expect(&mut self, command: Command) -> Asked {
        let asked = self.next();
        assert_eq!(asked.command, command as u16, "{command:?}");
        asked
    }

    fn refuse(&mut self, command: Command) {
        let asked = self.expect(command);
        self.expire(&asked);
    }

    fn expire(&mut self, asked: &Asked) {
        self.answer(asked, status::NETWORK_SESSION_EXPIRED, &[9, 0, 0, 0, 0, 0, 0, 0]);
    }

    fn take(&mut self, asked: &Asked) {
        let mut body = Writer::default();
        match asked.command {
            command if command == Command::TreeConnect as u16 => {
                body.u16(16).u8(1).u8(0).u32(0).u32(0).u32(0);
            }
            command if command == Command::Create as u16 => {
                body.u16(89).zeros(46).u64(SIZE).zeros(8).bytes(&[5; 16]).zeros(8);
            }
            command if command == Command::QueryInfo as u16 => {
                body.u16(9).u16(72).u32(8).u64(77);
            }
            command if command == Command::Write as u16 => {
                body.u16(17).u16(0).bytes(&asked.message[HEADER_BYTES + 4..][..4]).zeros(8);
            }
            command if command == Command::Read as u16 => {
                let length = u32::try_from(PIECE).unwrap();
                body.u16(17).u8(80).u8(0).u32(length).u32(0).u32(0).zeros(PIECE);
            }
            _ => {
                body.u16(60).zeros(58);
            }
        }
        self.answer(asked, status::SUCCESS, &body.0);
    }

    fn open(&mut self) {
        for command in [Command::TreeConnect, Command::Create] {
            let asked = self.expect(command);
            self.take(&asked);
        }
    }

    fn number(&mut self) {
        let asked = self.expect(Command::QueryInfo);
        self.take(&asked);
    }

    fn close(&mut self) {
        let asked = self.expect(Command::Close);
        self.take(&asked);
    }

    /// Takes a login by NTLM, whoever it is.
    fn renew(&mut self) {
        let asked = self.expect(Command::SessionSetup);
        self.set_up(&asked, status::MORE_PROCESSING_REQUIRED, &challenge());
        let asked = self.expect(Command::SessionSetup);
        self.set_up(&asked, status::SUCCESS, &[]);
    }

    fn set_up(&mut self, asked: &Asked, code: u32, token: &[u8]) {
        let mut body = Writer::default();
        body.u16(9).u16(0).u16(72).u16(token.len().try_into().unwrap()).bytes(token);
        self.answer(asked, code, &body.0);
    }

    /// Fails where the client says something before it is answered.
    fn hears_nothing(&mut self) {
        self.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let heard = self.stream.read(&mut [0]);
        let is_silent = heard.as_ref().is_err_and(|error| {
            matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
        });
        assert!(is_silent, "{heard:?}");
        self.stream.set_read_timeout(Some(AMPLE)).unwrap();
    }
}

/// NTLM's second message (MS-NLMP 2.2.1.2) in SPNEGO.
fn challenge() -> Vec<u8> {
    let name: Vec<u8> = "LAB".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut about = Writer::default();
    about.u16(2).u16(6).bytes(&name).u16(0).u16(0);
    let mut token = Writer::default();
    token.bytes(b"NTLMSSP\0").u32(2).u16(6).u16(6).u32(56).u32(0xe289_8215).bytes(&[3; 8]).zeros(8);
    let length = u16::try_from(about.0.len()).unwrap();
    token.u16(length).u16(length).u32(62).bytes(&[10, 0, 0x7c, 0x4f, 0, 0, 0, 15]);
    token.bytes(&name).bytes(&about.0);
    let element = |tag: u8, content: &[u8]| {
        [&[tag, u8::try_from(content.len()).unwrap()][..], content].concat()
    };
    let state = element(0xa0, &element(0x0a, &[1]));
    let token = element(0xa2, &element(4, &token.0));
    element(0xa1, &element(0x30, &[state, token].concat()))
}

/// A client that is logged in at a server that does as `script` says.
fn client(
    script: impl FnOnce(&mut Server) + Send + 'static,
) -> (Arc<SmbClient>, Arc<Session>, JoinHandle<(Server, ())>) {
    let (link, server) = connected(true, AMPLE, move |server| {
        server.credits = 16;
        script(server);
    });
    let session = Arc::new(Session::over(link, HOST));
    let login = Login {
        user: r"LAB\user".into(),
        password: Zeroizing::new("x".into()),
        method: Method::Ntlm,
        kdc: None,
    };
    // Nobody listens there: what a test does is done on the session that it has.
    let options = SmbOptions { port: 1, reconnect_for: Duration::ZERO, ..SmbOptions::new(login) };
    let client = SmbClient::new(options);
    let slot = Slot { session: Some(session.clone()), ..Slot::default() };
    client.servers.lock().insert(HOST.into(), Arc::new(Mutex::new(slot)));
    (Arc::new(client), session, server)
}

fn place() -> SharePath {
    SharePath { server: HOST.into(), share: "vms".into(), path: "x".into() }
}

/// Nobody else could close it, and it would keep the file from whoever removes it.
#[test]
fn a_handle_is_closed_where_nothing_more_is_known_of_its_file() {
    let (client, session, server) = client(|server| {
        server.open();
        let asked = server.expect(Command::QueryInfo);
        server.answer(&asked, status::ACCESS_DENIED, &[9, 0, 0, 0, 0, 0, 0, 0]);
        server.close();
    });
    let error = SmbFile::create(&client, &place()).err().unwrap();
    assert!(matches!(error, SmbError::Denied { .. }), "{error}");
    assert!(!session.link.is_broken());
    drop((client, session));
    server.join().unwrap();
}

#[test]
fn a_handle_outlives_the_ticket_that_it_was_opened_with() {
    let (client, session, server) = client(|server| {
        server.open();
        server.refuse(Command::QueryInfo);
        server.renew();
        server.number();
        server.close();
    });
    // Not asked for twice: the file would be there.
    drop(SmbFile::create(&client, &place()).unwrap());
    server.join().unwrap();
    assert_eq!(session.link.renewals(), 1);
}

/// Whoever is refused, and finds that somebody else has renewed the session in between, goes on with it.
#[test]
fn what_was_refused_before_others_renewed_is_asked_again() {
    let ((came, has_come), (go, may_go)) = (channel(), channel());
    let (client, session, server) = client(move |server| {
        let asked = server.expect(Command::TreeConnect);
        server.take(&asked);
        let asked = server.expect(Command::Create);
        came.send(()).unwrap();
        may_go.recv().unwrap();
        server.expire(&asked);
        server.open();
        server.number();
        server.close();
    });
    std::thread::scope(|scope| {
        scope.spawn(|| drop(SmbFile::create(&client, &place()).unwrap()));
        has_come.recv().unwrap();
        session.link.renewed();
        go.send(()).unwrap();
    });
    server.join().unwrap();
    assert_eq!(session.link.renewals(), 1);
}

/// Pieces that the server has still to do could else come after what is written there later.
#[test]
fn pieces_that_are_under_way_end_before_the_call_is_repeated() {
    for command in [Command::Write, Command::Read] {
        let (client, session, server) = client(move |server| {
            server.open();
            server.number();
            let asked = [(); 3].map(|()| server.expect(command));
            server.expire(&asked[0]);
            server.hears_nothing();
            server.take(&asked[1]);
            server.hears_nothing();
            server.take(&asked[2]);
            server.renew();
            for _ in 0..3 {
                let asked = server.expect(command);
                server.take(&asked);
            }
            server.close();
        });
        let file = SmbFile::open_writable(&client, &place()).unwrap();
        let mut data = vec![1; 3 * PIECE];
        match command {
            Command::Write => file.write_at(&data, 0).unwrap(),
            _ => file.read_at(&mut data, 0).unwrap(),
        }
        drop(file);
        server.join().unwrap();
        assert_eq!(session.link.renewals(), 1);
    }
}
