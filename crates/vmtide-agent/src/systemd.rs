//! Telling systemd how the service is: ready, stopping, alive.
//!
//! The protocol is one datagram per message to the socket that `NOTIFY_SOCKET` names (sd_notify(3)); without it
//! nothing is sent. The watchdog is fed from the runtime that answers requests, so that a runtime that hangs is
//! noticed.

use std::time::Duration;

/// The service answers requests from now on.
pub const READY: &str = "READY=1";
/// The service is about to end.
pub const STOPPING: &str = "STOPPING=1";
/// The service lives.
pub const WATCHDOG: &str = "WATCHDOG=1";

/// Sends a message. One that cannot be sent is logged: the service does its work all the same.
pub fn notify(message: &str) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(&socket, message)
    {
        tracing::warn!(%error, "systemd could not be told {message}");
    }
}

#[cfg(unix)]
fn send(socket: &std::ffi::OsStr, message: &str) -> std::io::Result<()> {
    use std::os::unix::net::UnixDatagram;
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    #[cfg(target_os = "linux")]
    {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::net::SocketAddr;
        if let Some(name) = socket.as_bytes().strip_prefix(b"@") {
            let address = SocketAddr::from_abstract_name(name)?;
            return sender.send_to_addr(message.as_bytes(), &address).map(drop);
        }
    }
    sender.send_to(message.as_bytes(), socket).map(drop)
}

#[cfg(not(unix))]
fn send(_socket: &std::ffi::OsStr, _message: &str) -> std::io::Result<()> {
    Ok(())
}

/// How often the watchdog wants to be fed: half of what systemd allows. None where it does not ask.
pub fn watchdog_interval() -> Option<Duration> {
    let for_other = std::env::var("WATCHDOG_PID")
        .is_ok_and(|process| process.parse() != Ok(std::process::id()));
    if for_other {
        return None;
    }
    interval_of(&std::env::var("WATCHDOG_USEC").ok()?)
}

fn interval_of(allowed_us: &str) -> Option<Duration> {
    let allowed_us: u64 = allowed_us.parse().ok()?;
    (allowed_us >= 2).then(|| Duration::from_micros(allowed_us / 2))
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_as_datagrams() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), READY).unwrap();
        let mut message = [0; 32];
        let length = socket.recv(&mut message).unwrap();
        assert_eq!(&message[..length], READY.as_bytes());
    }

    #[test]
    fn the_watchdog_is_fed_twice_as_often_as_it_wants() {
        assert_eq!(interval_of("30000000"), Some(Duration::from_secs(15)));
        assert_eq!(interval_of("0"), None);
        assert_eq!(interval_of("soon"), None);
    }
}
