//! Something between client and server that is slow, as a bad network is.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

/// Starts one that holds back what the client says as the `number`th (from 0) on each connection, for the time of
/// `delay`. Answers with its port.
pub fn start(server: u16, number: u32, delay: Duration) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut server = TcpStream::connect(("127.0.0.1", server)).unwrap();
            let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                drop(std::io::copy(&mut from, &mut to));
                drop(to.shutdown(Shutdown::Both));
            });
            std::thread::spawn(move || {
                let mut buffer = vec![0; 64 << 10];
                for said in 0_u32.. {
                    let Ok(length @ 1..) = client.read(&mut buffer) else { break };
                    if said == number {
                        std::thread::sleep(delay);
                    }
                    if server.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
                drop(server.shutdown(Shutdown::Both));
            });
        }
    });
    port
}
