//! Offering disks over NBD: images of every format, block devices, and the disks of restore points.

use crate::image::files::check_no_children;
use crate::image::open::{hint, image_options, open_disk};
use crate::image::{DiskSpec, OpenDiskOptions};
use crate::in_use::{Use, check_not_in_use};
use crate::lock::ImageLock;
use crate::{EngineError, Result};
use serde::Serialize;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use vmtide_block::{BlockDevice, WritableBlockDevice};
use vmtide_image::{ImageWriter, open_writable};
pub use vmtide_nbd::TlsServerOptions;
use vmtide_nbd::{Export, NbdServer, ServerHandle, ServerOptions};
use vmtide_repo::{Repository, RestorePoint};
use vmtide_track::HostedImage;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A Unix socket that is made there.
    Unix(PathBuf),
    /// A host and port; port 0 takes any free one.
    Tcp(String),
}

impl FromStr for ListenAddress {
    type Err = String;

    /// Understands `unix:PATH` and `HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("unix: needs a path, e.g. unix:/run/disk.sock".into()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        match port {
            Some(Ok(_)) => Ok(Self::Tcp(text.into())),
            _ => Err(format!("{text:?} is no address: write unix:PATH or HOST:PORT")),
        }
    }
}

/// A disk that can be served.
pub struct ServedDisk {
    /// The name of the export; empty for the default one.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    backing: Backing,
}

enum Backing {
    ReadOnly(Arc<dyn BlockDevice>),
    Writable(Arc<dyn ImageWriter>, ImageLock),
    Tracked(Arc<HostedImage>),
}

/// One export of a running server. The serialised form is part of the `listening` event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServedExport {
    /// Its URL.
    pub url: String,
    /// Its name.
    pub name: String,
    /// What it is.
    pub description: String,
    /// The size in bytes.
    pub size_bytes: u64,
    /// Whether clients can write.
    pub writable: bool,
}

/// Who may write to what is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nobody.
    ReadOnly,
    /// Its clients, if no other image reads through it.
    Writable,
    /// Its clients, even where other images read through it, which breaks them.
    WritableParent,
}

/// Opens an image, block device or export to be served under `name`.
///
/// # Errors
/// As opening it; [`EngineError::Usage`] where what cannot be written is to be;
/// [`EngineError::Refused`] where other images would break.
pub fn open_image(
    spec: &DiskSpec,
    options: &OpenDiskOptions,
    name: &str,
    access: Access,
) -> Result<ServedDisk> {
    let writable = access != Access::ReadOnly;
    let backing = match spec {
        DiskSpec::Path(path) if writable && options.snapshot.is_none() => {
            check_not_in_use(path, Use::Write)?;
            crate::delta::check_complete(path)?;
            if access == Access::Writable {
                check_no_children(path, &options.search, "serve writable")?;
            }
            let lock = ImageLock::take(path)?;
            let (open, format) = image_options(path, options)?;
            let image =
                open_writable(path, &open).map_err(|error| hint(error, path, options, format))?;
            Backing::Writable(image, lock)
        }
        _ if writable => {
            return Err(EngineError::usage(format!(
                "{} cannot be served writable: only images and block devices can",
                spec.display()
            )));
        }
        spec => Backing::ReadOnly(open_disk(spec, options)?.device),
    };
    Ok(ServedDisk { name: name.into(), description: spec.display(), backing })
}

/// An image whose changes are tracked, to be served under `name`, writable.
pub fn tracked(image: Arc<HostedImage>, name: &str) -> ServedDisk {
    let description = image.path().display().to_string();
    ServedDisk { name: name.into(), description, backing: Backing::Tracked(image) }
}

/// The disks of a restore point, or the one called `disk`, each under its id. A single one is the
/// default export.
///
/// # Errors
/// [`EngineError::NotFound`] where there is no such disk; those of the repository.
pub fn open_point(
    repository: &Repository,
    point: &RestorePoint,
    disk: Option<&str>,
) -> Result<Vec<ServedDisk>> {
    let chosen: Vec<_> =
        point.disks.iter().filter(|record| disk.is_none_or(|disk| record.id == disk)).collect();
    if chosen.is_empty() {
        let ids: Vec<_> = point.disks.iter().map(|record| record.id.as_str()).collect();
        return Err(EngineError::NotFound {
            what: format!("disk {} in restore point {}", disk.unwrap_or_default(), point.id),
            hint: format!("it has {}", ids.join(", ")),
        });
    }
    let is_only = chosen.len() == 1;
    let open = |record: &&vmtide_repo::DiskRecord| {
        let device = repository.open_disk(point, &record.id)?;
        Ok(ServedDisk {
            name: if is_only { String::new() } else { record.id.clone() },
            description: format!("disk {} of {} at {}", record.id, point.vm, point.time),
            backing: Backing::ReadOnly(device),
        })
    };
    chosen.iter().map(open).collect()
}

/// A server that runs.
pub struct DiskServer {
    handle: ServerHandle,
    exports: Vec<ServedExport>,
    writers: Vec<(Arc<dyn ImageWriter>, ImageLock)>,
    tracked: Vec<Arc<HostedImage>>,
    asks_who: bool,
}

impl DiskServer {
    /// Begins to serve the disks, with certificates over TLS alone.
    ///
    /// # Errors
    /// Where the address cannot be listened on, or the certificates cannot be used.
    pub fn start(
        disks: Vec<ServedDisk>,
        address: &ListenAddress,
        tls: Option<TlsServerOptions>,
    ) -> Result<Self> {
        let asks_who = tls.as_ref().is_some_and(|tls| tls.client_authorities.is_some());
        let options = ServerOptions { tls, ..ServerOptions::default() };
        let mut server = NbdServer::new().options(options);
        let (mut exports, mut writers, mut tracked) = (Vec::new(), Vec::new(), Vec::new());
        for disk in disks {
            let (export, size_bytes, writable) = match disk.backing {
                Backing::ReadOnly(device) => {
                    let size_bytes = device.size_bytes();
                    (Export::read_only(device), size_bytes, false)
                }
                Backing::Writable(image, lock) => {
                    writers.push((Arc::clone(&image), lock));
                    let size_bytes = image.size_bytes();
                    (Export::writable(image).with_fast_zeroes(), size_bytes, true)
                }
                Backing::Tracked(image) => {
                    let disk: Arc<dyn WritableBlockDevice> = Arc::clone(image.disk()) as _;
                    tracked.push(image);
                    let size_bytes = disk.size_bytes();
                    (Export::writable(disk).with_fast_zeroes(), size_bytes, true)
                }
            };
            server = server.export(export.named(&disk.name).described(&disk.description));
            exports.push(ServedExport {
                url: String::new(),
                name: disk.name,
                description: disk.description,
                size_bytes,
                writable,
            });
        }
        let handle = match address {
            #[cfg(unix)]
            ListenAddress::Unix(path) => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                server.listen_unix(path)?
            }
            #[cfg(not(unix))]
            ListenAddress::Unix(_) => {
                return Err(EngineError::usage("there are no Unix sockets here: give HOST:PORT"));
            }
            ListenAddress::Tcp(address) => server.listen_tcp(address.as_str())?,
        };
        for export in &mut exports {
            export.url = handle.url_of(&export.name).to_string();
        }
        Ok(Self { handle, exports, writers, tracked, asks_who })
    }

    /// What is served, with the URLs.
    pub fn exports(&self) -> &[ServedExport] {
        &self.exports
    }

    /// Whether anybody on the network can connect, and not only this host or those with a certificate.
    pub fn is_exposed(&self) -> bool {
        !self.asks_who
            && self.handle.local_addr().is_some_and(|address| !address.ip().is_loopback())
    }

    /// Takes no more requests, answers those under way, and closes written images in order.
    ///
    /// # Errors
    /// Where what was written cannot be brought to the medium.
    pub fn stop(self) -> Result<()> {
        self.handle.shutdown();
        for (image, _lock) in self.writers {
            image.finish()?;
        }
        for image in self.tracked {
            image.close()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood() {
        let parse = |text: &str| text.parse::<ListenAddress>();
        assert_eq!(parse("unix:/run/x"), Ok(ListenAddress::Unix("/run/x".into())));
        for text in ["127.0.0.1:10809", "localhost:0", "[::1]:10809"] {
            assert_eq!(parse(text), Ok(ListenAddress::Tcp(text.into())));
        }
        for bad in ["", "unix:", "localhost", "localhost:x", "host:99999", "/run/x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
