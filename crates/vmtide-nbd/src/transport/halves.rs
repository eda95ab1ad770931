//! The two halves of a connection, so that one thread waits for replies while others send.
//!
//! Without TLS the halves are two handles on one socket. With TLS the record state is one object
//! for both directions; it is locked only while bytes are encrypted or decrypted, never while a
//! socket is waited for.

use super::Stream;
use parking_lot::Mutex;
use std::io::{self, Read, Write};
use std::sync::Arc;

/// What a plain half reads ahead: reply headers are 16 to 32 bytes, and a read of its own for
/// each would cost a system call. Payloads larger than this go straight to their destination.
const READ_AHEAD_BYTES: usize = 4096;

/// One read of ciphertext, and the plaintext encrypted at a time: four TLS records.
const TLS_BUFFER_BYTES: usize = 64 << 10;

type SharedTls = Arc<Mutex<rustls::Connection>>;

/// The receiving half.
#[derive(Debug)]
pub(crate) struct ReadHalf {
    stream: Arc<Stream>,
    tls: Option<SharedTls>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct WriteHalf {
    stream: Arc<Stream>,
    tls: Option<SharedTls>,
    sealed: Vec<u8>,
}

/// Splits a connection; `tls` is the state after its handshake.
pub(crate) fn split(stream: Arc<Stream>, tls: Option<rustls::Connection>) -> (ReadHalf, WriteHalf) {
    let tls = tls.map(|mut tls| {
        // What is written is taken out at once, in bounded pieces.
        tls.set_buffer_limit(None);
        Arc::new(Mutex::new(tls))
    });
    let size = match tls {
        Some(_) => TLS_BUFFER_BYTES,
        None => READ_AHEAD_BYTES,
    };
    let read = ReadHalf {
        stream: Arc::clone(&stream),
        tls: tls.clone(),
        buffer: vec![0; size].into_boxed_slice(),
        start: 0,
        end: 0,
    };
    let write = WriteHalf { stream, tls, sealed: Vec::new() };
    (read, write)
}

impl ReadHalf {
    fn refill(&mut self) -> io::Result<usize> {
        self.start = 0;
        self.end = 0;
        self.end = self.stream.receive(&mut self.buffer)?;
        Ok(self.end)
    }

    fn read_plain(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end {
            if out.len() >= self.buffer.len() {
                return self.stream.receive(out);
            }
            self.refill()?;
        }
        let count = out.len().min(self.end - self.start);
        out[..count].copy_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }

    fn read_tls(&mut self, tls: &SharedTls, out: &mut [u8]) -> io::Result<usize> {
        loop {
            match tls.lock().reader().read(out) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if self.start == self.end {
                self.refill()?;
            }
            let mut tls = tls.lock();
            // At the end of the stream this passes nothing on, which is how the state learns it.
            let count = tls.read_tls(&mut &self.buffer[self.start..self.end])?;
            self.start += count;
            tls.process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

impl Read for ReadHalf {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        match self.tls.clone() {
            Some(tls) => self.read_tls(&tls, out),
            None => self.read_plain(out),
        }
    }
}

impl WriteHalf {
    /// Sends all of `header` and `payload`.
    pub(crate) fn send(&mut self, header: &[u8], payload: &[u8]) -> io::Result<()> {
        if self.tls.is_some() {
            self.write_all(header)?;
            return self.write_all(payload);
        }
        let mut sent = 0;
        while sent < header.len() {
            match self.stream.send_two(&header[sent..], payload) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.write_all(&payload[sent - header.len()..])
    }

    fn seal(&mut self, tls: &SharedTls, bytes: &[u8]) -> io::Result<()> {
        self.sealed.clear();
        let mut tls = tls.lock();
        tls.writer().write_all(bytes)?;
        while tls.wants_write() {
            tls.write_tls(&mut self.sealed)?;
        }
        Ok(())
    }

    fn send_sealed(&self) -> io::Result<()> {
        let mut rest = &self.sealed[..];
        while !rest.is_empty() {
            match self.stream.send(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Write for WriteHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = self.tls.clone() else {
            return self.stream.send(bytes);
        };
        let piece = &bytes[..bytes.len().min(TLS_BUFFER_BYTES)];
        self.seal(&tls, piece)?;
        self.send_sealed()?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
