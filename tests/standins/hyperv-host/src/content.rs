//! What a virtual disk must read as, byte by byte: the reference that images, backups and restores are held
//! against. Kept apart from every image format.

use std::collections::BTreeMap;
use std::sync::Arc;
use vmtide_block::BlockDevice;

/// The unit in which content is kept and shared between moments.
const PAGE: usize = 4096;

/// The bytes of a disk at one moment. Cloning shares the pages.
#[derive(Clone, Debug, Default)]
pub struct Content {
    size_bytes: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
}

impl Content {
    /// A disk of zeros.
    pub fn new(size_bytes: u64) -> Self {
        Self { size_bytes, pages: BTreeMap::new() }
    }

    /// The size in bytes.
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes that were written, rounded up to pages: about what an image of it takes.
    pub fn written_bytes(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// Writes; what reaches past the end is an error of the caller.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= self.size_bytes, "a write past the end of the disk");
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let inside = index(at % PAGE as u64);
            let length = rest.len().min(PAGE - inside);
            let page = self.pages.entry(at / PAGE as u64).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[inside..inside + length].copy_from_slice(&rest[..length]);
            rest = &rest[length..];
            at += length as u64;
        }
    }

    /// Reads.
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let inside = index(at % PAGE as u64);
            let piece = (length - done).min(PAGE - inside);
            if let Some(page) = self.pages.get(&(at / PAGE as u64)) {
                bytes[done..done + piece].copy_from_slice(&page[inside..inside + piece]);
            }
            done += piece;
        }
        bytes
    }

    /// Changes the size.
    pub fn resize(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
        let kept = size_bytes.div_ceil(PAGE as u64);
        self.pages.retain(|page, _| *page < kept);
        let inside = index(size_bytes % PAGE as u64);
        if inside > 0
            && let Some(page) = self.pages.get_mut(&(size_bytes / PAGE as u64))
        {
            Arc::make_mut(page)[inside..].fill(0);
        }
    }

    /// Compares with a device, all of it.
    ///
    /// # Errors
    /// The first byte that differs, another size, or why the device cannot be read.
    pub fn compare(&self, device: &dyn BlockDevice) -> Result<(), String> {
        const PIECE: u64 = 1 << 20;
        if device.size_bytes() != self.size_bytes {
            return Err(format!("{} bytes, not {}", device.size_bytes(), self.size_bytes));
        }
        let mut at = 0;
        let mut buffer = vec![0; index(PIECE)];
        while at < self.size_bytes {
            let length = index(PIECE.min(self.size_bytes - at));
            let found = &mut buffer[..length];
            device.read_at(found, at).map_err(|error| error.to_string())?;
            let wanted = self.read(at, length);
            if found != wanted.as_slice() {
                let byte = found.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
                return Err(format!("byte {} differs", at + byte as u64));
            }
            at += length as u64;
        }
        Ok(())
    }

    /// Takes over what a device holds.
    pub(crate) fn of(device: &dyn BlockDevice) -> vmtide_block::Result<Self> {
        let mut content = Self::new(device.size_bytes());
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < content.size_bytes {
            let length = index((content.size_bytes - at).min(1 << 20));
            device.read_at(&mut buffer[..length], at)?;
            for (number, page) in buffer[..length].chunks(PAGE).enumerate() {
                if !vmtide_block::is_zero(page) {
                    content.write(at + (number * PAGE) as u64, page);
                }
            }
            at += length as u64;
        }
        Ok(content)
    }
}

/// Offsets within a buffer always fit.
fn index(value: u64) -> usize {
    usize::try_from(value).expect("an offset within a buffer")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    #[test]
    fn content_reads_as_written_and_moments_are_apart() {
        let mut content = Content::new(20_000);
        content.write(4000, &[1; 200]);
        let earlier = content.clone();
        content.write(4096, &[2; 5000]);
        let mut bytes = vec![0; 20_000];
        bytes[4000..4200].fill(1);
        earlier.compare(&MemoryDevice::from_bytes(bytes.clone())).unwrap();
        bytes[4096..9096].fill(2);
        content.compare(&MemoryDevice::from_bytes(bytes.clone())).unwrap();
        bytes[9095] = 3;
        let error = content.compare(&MemoryDevice::from_bytes(bytes)).unwrap_err();
        assert_eq!(error, "byte 9095 differs");
        content.resize(5000);
        content.resize(20_000);
        assert_eq!(content.read(4990, 20), [vec![2; 10], vec![0; 10]].concat());
    }
}
