//! The client against a real Samba: logins, rights, reading and writing, broken connections.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

mod support;

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use support::{Proxy, Samba, map, pattern};
use vmtide_block::{BlockDevice, BlockError, ByteRange, WritableBlockDevice};
use vmtide_smb::{Protection, SharePath, SmbClient, SmbError, SmbFile, SmbOptions};
use zeroize::Zeroizing;

fn place(path: &str) -> SharePath {
    map().locate(path).unwrap()
}

fn read_all(file: &SmbFile) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.size_bytes()).unwrap()];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn files_are_read_in_every_protection() {
    let samba = Samba::start();
    let content = pattern(1, (9 << 20) + 12_345);
    std::fs::write(samba.path("vms/größe 1.bin"), &content).unwrap();
    std::fs::write(samba.path("vms/empty"), b"").unwrap();
    for protection in [Protection::EncryptedWhereOffered, Protection::Encrypted, Protection::Signed]
    {
        let client = Arc::new(SmbClient::new(SmbOptions { protection, ..samba.options() }));
        let file = SmbFile::open(&client, &place(r"C:\VMs\größe 1.bin")).unwrap();
        assert!(read_all(&file) == content, "{protection:?}");
        assert!(client.traffic().received_bytes > content.len() as u64);
        let mut middle = [0; 1000];
        file.read_at(&mut middle, 5_000_001).unwrap();
        assert_eq!(middle, content[5_000_001..5_001_001]);
        assert!(matches!(
            file.read_at(&mut middle, content.len() as u64 - 999),
            Err(BlockError::OutOfRange { .. })
        ));
        assert_eq!(SmbFile::open(&client, &place(r"C:\VMs\empty")).unwrap().size_bytes(), 0);
        // Many at once over the one connection.
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (file, content) = (&file, &content);
                scope.spawn(move || {
                    for turn in 0..20 {
                        let at = (thread * 1_111_111 + turn * 77_777) % (9 << 20);
                        let mut buffer = vec![0; 300_000.min(content.len() - at as usize)];
                        file.read_at(&mut buffer, at).unwrap();
                        assert!(buffer[..] == content[at as usize..][..buffer.len()]);
                    }
                });
            }
        });
    }
}

#[test]
fn servers_that_sign_by_cmac_or_do_not_encrypt() {
    // As Windows Server 2016 and 2019 sign, which know no GMAC.
    let samba = Samba::with("server smb3 signing algorithms = AES-128-CMAC\nsmb encrypt = off");
    std::fs::write(samba.path("vms/x"), pattern(2, 3 << 20)).unwrap();
    let client = samba.client();
    let file = SmbFile::open(&client, &place(r"C:\VMs\x")).unwrap();
    assert!(read_all(&file) == pattern(2, 3 << 20));
    let strict = SmbOptions { protection: Protection::Encrypted, ..samba.options() };
    let error =
        SmbFile::open(&Arc::new(SmbClient::new(strict)), &place(r"C:\VMs\x")).err().unwrap();
    assert!(error.to_string().contains("insisted on"), "{error}");

    let samba =
        Samba::with("server smb3 encryption algorithms = AES-256-GCM\nsmb encrypt = required");
    std::fs::write(samba.path("vms/x"), pattern(3, 3 << 20)).unwrap();
    let file = SmbFile::open(&samba.client(), &place(r"C:\VMs\x")).unwrap();
    assert!(read_all(&file) == pattern(3, 3 << 20));
    let signed = SmbOptions { protection: Protection::Signed, ..samba.options() };
    assert!(SmbFile::open(&Arc::new(SmbClient::new(signed)), &place(r"C:\VMs\x")).is_err());

    let samba = Samba::with("server max protocol = SMB3_02");
    let error = SmbFile::open(&samba.client(), &place(r"C:\VMs\x")).err().unwrap();
    assert!(matches!(error, SmbError::Unsupported { .. }), "{error}");
}

#[test]
fn logins_and_rights_that_are_missing_are_told_apart() {
    // Whoever fails would be a guest here; a guest is refused.
    let samba = Samba::with("map to guest = bad user\nguest account = nobody");
    std::fs::write(samba.path("vms/x"), b"x").unwrap();
    std::fs::write(samba.path("look/x"), b"x").unwrap();
    std::fs::write(samba.path("private/x"), b"x").unwrap();
    let with = |change: &dyn Fn(&mut SmbOptions)| {
        let mut options = samba.options();
        change(&mut options);
        Arc::new(SmbClient::new(options))
    };
    let wrong = with(&|options| options.login.password = Zeroizing::new("wrong".into()));
    let error = SmbFile::open(&wrong, &place(r"C:\VMs\x")).err().unwrap();
    assert!(matches!(error, SmbError::Login { .. }), "{error}");
    assert!(error.to_string().contains("password is wrong"), "{error}");
    assert!(!error.to_string().contains("Backup!"), "{error}");
    let guest = with(&|options| options.login.user = "nobody-knows-me".into());
    let error = SmbFile::open(&guest, &place(r"C:\VMs\x")).err().unwrap();
    assert!(matches!(error, SmbError::Login { .. }), "{error}");
    let down = with(&|options| options.port = 1);
    let error = SmbFile::open(&down, &place(r"C:\VMs\x")).err().unwrap();
    assert!(matches!(error, SmbError::Unreachable { .. }), "{error}");

    let client = samba.client();
    let error = SmbFile::open(&client, &place(r"E:\x")).err().unwrap();
    assert!(matches!(error, SmbError::Denied { .. }), "{error}");
    let error = SmbFile::open(&client, &place(r"F:\x")).err().unwrap();
    assert!(matches!(error, SmbError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("no such share"), "{error}");
    for path in [r"C:\VMs\none", r"C:\VMs\none\none"] {
        let error = SmbFile::open(&client, &place(path)).err().unwrap();
        assert!(matches!(error, SmbError::NotFound { .. }), "{error}");
    }
    SmbFile::open(&client, &place(r"D:\x")).unwrap();
    for error in [
        SmbFile::create(&client, &place(r"D:\new")).err().unwrap(),
        SmbFile::open_writable(&client, &place(r"D:\x")).err().unwrap(),
    ] {
        assert!(matches!(error, SmbError::Denied { .. }), "{error}");
    }
}

#[test]
fn a_writer_and_a_reader_keep_each_other_out() {
    let samba = Samba::start();
    std::fs::write(samba.path("vms/x"), b"x").unwrap();
    let (ours, theirs) = (samba.client(), samba.client());
    let path = place(r"C:\VMs\x");
    let reader = SmbFile::open(&ours, &path).unwrap();
    let second = SmbFile::open(&theirs, &path).unwrap();
    assert_eq!(reader.key(), second.key());
    let error = SmbFile::open_writable(&theirs, &path).err().unwrap();
    assert!(matches!(error, SmbError::InUse { .. }), "{error}");
    drop((reader, second));
    let writer = SmbFile::open_writable(&theirs, &path).unwrap();
    let error = SmbFile::open(&ours, &path).err().unwrap();
    assert!(matches!(error, SmbError::InUse { .. }), "{error}");
    // What is dropped is closed when the next line runs.
    drop(writer);
    SmbFile::open(&ours, &path).unwrap();
}

#[test]
fn what_is_written_is_there() {
    let samba = Samba::start();
    let client = samba.client();
    let path = place(r"C:\VMs\new.bin");
    let file = SmbFile::create(&client, &path).unwrap();
    let mut model = pattern(4, 5 << 20);
    file.resize(model.len() as u64).unwrap();
    file.write_at(&model, 0).unwrap();
    file.write_zeroes(ByteRange::new(100_000, 2_000_000)).unwrap();
    model[100_000..2_100_000].fill(0);
    file.write_at(b"hello", 7).unwrap();
    model[7..12].copy_from_slice(b"hello");
    file.resize(4 << 20).unwrap();
    model.truncate(4 << 20);
    file.flush().unwrap();
    assert!(matches!(file.write_at(b"x", 4 << 20), Err(BlockError::OutOfRange { .. })));
    assert!(std::fs::read(samba.path("vms/new.bin")).unwrap() == model);
    drop(file);
    let error = SmbFile::create(&client, &path).err().unwrap();
    assert!(matches!(error, SmbError::Exists { .. }), "{error}");
    let file = SmbFile::open(&client, &path).unwrap();
    assert!(read_all(&file) == model);
    assert!(matches!(file.write_at(b"x", 0), Err(BlockError::ReadOnly { .. })));
}

#[test]
fn a_reader_survives_a_cut_connection() {
    let samba = Samba::start();
    let content = pattern(5, 20 << 20);
    std::fs::write(samba.path("vms/x"), &content).unwrap();
    let proxy = Proxy::start(samba.port);
    let options = SmbOptions { port: proxy.port, ..samba.options() };
    let client = Arc::new(SmbClient::new(options));
    let file = SmbFile::open(&client, &place(r"C:\VMs\x")).unwrap();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut bytes = vec![0; content.len()];
                    for (number, piece) in bytes.chunks_mut(1 << 18).enumerate() {
                        file.read_at(piece, number as u64 * (1 << 18)).unwrap();
                    }
                    bytes == content
                })
            })
            .collect();
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(30));
            proxy.cut();
        }
        assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
    });
    // Cut while nobody reads, too.
    proxy.cut();
    assert!(read_all(&file) == content);
}

#[test]
fn a_connection_that_stays_away_or_another_file_ends_the_read() {
    let samba = Samba::start();
    std::fs::write(samba.path("vms/x"), pattern(6, 1 << 20)).unwrap();
    std::fs::write(samba.path("vms/y"), pattern(7, 1 << 20)).unwrap();
    let proxy = Proxy::start(samba.port);
    let options = SmbOptions {
        port: proxy.port,
        reconnect_for: Duration::from_secs(1),
        timeout: Duration::from_secs(10),
        ..samba.options()
    };
    let client = Arc::new(SmbClient::new(options));
    let file = SmbFile::open(&client, &place(r"C:\VMs\x")).unwrap();
    let mut buffer = [0; 4096];
    proxy.close(true);
    proxy.cut();
    let error = file.read_at(&mut buffer, 0).unwrap_err();
    assert!(matches!(error, BlockError::Disconnected { .. }), "{error}");
    proxy.close(false);
    file.read_at(&mut buffer, 0).unwrap();
    proxy.cut();
    // Another file under the name: it has the size, and is another one.
    std::fs::rename(samba.path("vms/y"), samba.path("vms/x")).unwrap();
    let error = file.read_at(&mut buffer, 0).unwrap_err();
    assert!(error.to_string().contains("changed or replaced"), "{error}");
}

#[test]
fn a_writer_does_not_go_on_over_a_new_connection() {
    let samba = Samba::start();
    let proxy = Proxy::start(samba.port);
    let options = SmbOptions { port: proxy.port, ..samba.options() };
    let client = Arc::new(SmbClient::new(options));
    let file = SmbFile::create(&client, &place(r"C:\VMs\x")).unwrap();
    file.resize(1 << 20).unwrap();
    file.write_at(&[1; 4096], 0).unwrap();
    file.flush().unwrap();
    // All of it is on the medium: the connection may break.
    proxy.cut();
    file.flush().unwrap();
    file.write_at(&[2; 4096], 4096).unwrap();
    proxy.cut();
    let error = file.write_at(&[3; 4096], 8192).unwrap_err();
    assert!(error.to_string().contains("may be lost"), "{error}");
    let error = file.flush().unwrap_err();
    assert!(matches!(error, BlockError::Disconnected { .. } | BlockError::Io { .. }), "{error}");
    assert_ne!(error.io_kind(), Some(ErrorKind::NotFound));
}

#[test]
fn a_server_that_changes_messages_is_found_out() {
    let samba = Samba::start();
    std::fs::write(samba.path("vms/x"), pattern(8, 1 << 20)).unwrap();
    for protection in [Protection::EncryptedWhereOffered, Protection::Signed] {
        let forger = forge(samba.port);
        let options = SmbOptions {
            port: forger,
            protection,
            reconnect_for: Duration::ZERO,
            ..samba.options()
        };
        let client = Arc::new(SmbClient::new(options));
        let file = SmbFile::open(&client, &place(r"C:\VMs\x")).unwrap();
        let mut buffer = vec![0; 1 << 20];
        let error = file.read_at(&mut buffer, 0).unwrap_err();
        assert!(matches!(error, BlockError::Damaged { .. }), "{protection:?}: {error}");
    }
}

/// A proxy that changes one byte of every long message of the server, as somebody in between would.
fn forge(server: u16) -> u16 {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut server = TcpStream::connect(("127.0.0.1", server)).unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            std::thread::spawn(move || {
                let mut head = [0; 4];
                while server.read_exact(&mut head).is_ok() {
                    let mut message = vec![0; u32::from_be_bytes(head) as usize];
                    if server.read_exact(&mut message).is_err() {
                        break;
                    }
                    if message.len() > 10_000 {
                        message[5_000] ^= 1;
                    }
                    let sent = client.write_all(&head).and_then(|()| client.write_all(&message));
                    if sent.is_err() {
                        break;
                    }
                }
            });
        }
    });
    port
}
