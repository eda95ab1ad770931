//! Reads a disk, or a file, over SMB as a backup does, and says how fast and how many bytes crossed the network: for
//! `bench/smb.py`.
//!
//! `smb_read HOST PORT USER HOSTPATH MAPPING THREADS PROTECTION [PIECE_BYTES COUNT]`; the password is in
//! `VMTIDE_HYPERV_PASSWORD`. With PIECE_BYTES, COUNT pieces spread over the disk are read instead of all of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use vmtide_block::BlockDevice;
use vmtide_hyperv::{ChangesError, HostFiles};
use vmtide_smb::{Login, Method, PathMap, Protection, SmbClient, SmbFile, SmbFiles, SmbOptions};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [host, port, user, path, mapping, threads, protection, rest @ ..] = &arguments[..] else {
        return Err(
            "smb_read HOST PORT USER HOSTPATH MAPPING THREADS PROTECTION [PIECE COUNT]".into()
        );
    };
    let login = Login {
        user: user.clone(),
        password: std::env::var("VMTIDE_HYPERV_PASSWORD")?.into(),
        method: Method::Ntlm,
        kdc: None,
    };
    let protection = match protection.as_str() {
        "signed" => Protection::Signed,
        _ => Protection::Encrypted,
    };
    let options = SmbOptions { port: port.parse()?, protection, ..SmbOptions::new(login) };
    let client = Arc::new(SmbClient::new(options));
    let mut map = PathMap::new(host);
    map.mappings.push(mapping.parse()?);
    let device: Arc<dyn BlockDevice> = if path.ends_with(".vhdx") {
        let nothing = Arc::new(|_: &str, _: &str, _| Err(ChangesError::NotTracked(String::new())));
        SmbFiles::new(client.clone(), map, nothing).open_disk(path)?.device
    } else {
        Arc::new(SmbFile::open(&client, &map.locate(path)?)?)
    };
    let before = client.traffic();
    let start = Instant::now();
    let read_bytes = match rest {
        [piece, count] => read_pieces(&*device, piece.parse()?, count.parse()?)?,
        _ => read_all(&device, threads.parse()?)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    let received = client.traffic().received_bytes - before.received_bytes;
    println!(
        "{{\"read_bytes\":{read_bytes},\"received_bytes\":{received},\"seconds\":{seconds:.6}}}"
    );
    Ok(())
}

/// All of the disk, in megabytes that threads take one after the other.
fn read_all(device: &Arc<dyn BlockDevice>, threads: usize) -> Result<u64, Failure> {
    const PIECE: u64 = 1 << 20;
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> vmtide_block::Result<()> {
                    let mut buffer = vec![0; 1 << 20];
                    loop {
                        let at = next.fetch_add(PIECE, Ordering::Relaxed);
                        let length = PIECE.min(device.size_bytes().saturating_sub(at));
                        if length == 0 {
                            return Ok(());
                        }
                        let length = usize::try_from(length).unwrap_or_default();
                        device.read_at(&mut buffer[..length], at)?;
                    }
                })
            })
            .collect();
        for reader in readers {
            reader.join().map_err(|_| "a reader panicked")??;
        }
        Ok(device.size_bytes())
    })
}

/// Pieces in places that are spread over the disk.
fn read_pieces(device: &dyn BlockDevice, piece: u64, count: u64) -> Result<u64, Failure> {
    let places = (device.size_bytes() / piece).max(1);
    let mut buffer = vec![0; usize::try_from(piece)?];
    for number in 0..count {
        let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % places;
        device.read_at(&mut buffer, place * piece)?;
    }
    Ok(piece * count)
}
