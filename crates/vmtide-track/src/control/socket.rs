//! Where the socket of an image is.

use crate::store::with_suffix;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The longest path that the address of a Unix socket takes (`sun_path` of unix(7), with its zero).
const MAX_ADDRESS_BYTES: usize = 107;

/// The socket of the process that hosts the image at `path`: `.rct.socket` behind the image's real path, so that it is
/// one socket whatever links lead there.
pub fn socket_path(path: &Path) -> PathBuf {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    with_suffix(&real, "rct.socket")
}

/// The address of a socket: its path, or where that is too long one through its directory, which must stay open while
/// the address is used.
fn address(path: &Path) -> io::Result<(PathBuf, Option<File>)> {
    if path.as_os_str().len() <= MAX_ADDRESS_BYTES {
        return Ok((path.to_owned(), None));
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = File::open(directory)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((short, Some(directory)))
}

/// Connects to the host of an image; none where there is none.
pub(super) fn connect(path: &Path) -> io::Result<Option<UnixStream>> {
    let (address, _directory) = match address(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match UnixStream::connect(&address) {
        Ok(stream) => Ok(Some(stream)),
        // A killed host leaves its socket, on which nobody listens. A name too long is nobody's socket either.
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::InvalidInput => Ok(None),
            _ => Err(error),
        },
    }
}

/// Listens for those who ask. Whoever calls has the lock on the image, so a socket that is there is a killed host's.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (address, _directory) = address(path)?;
    let listener = UnixListener::bind(&address)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
