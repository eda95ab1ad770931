//! A stream with a deadline for everything done on it: the handshake's guard against peers that
//! send one byte a minute.

use super::Stream;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

/// A socket all of whose reads and writes end by a deadline.
pub(crate) struct TimedStream<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

impl<'a> TimedStream<'a> {
    /// Guards `stream` for `limit` from now.
    pub(crate) fn new(stream: &'a Stream, limit: Duration) -> Self {
        let deadline = Instant::now() + limit;
        Self { stream, deadline }
    }

    fn remaining(&self) -> io::Result<Option<Duration>> {
        match self.deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(timed_out()),
        }
    }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the peer did not finish the handshake in time")
}

/// A socket's own timeout arrives as either kind, depending on the system.
fn translate(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => timed_out(),
        _ => error,
    }
}

impl Read for TimedStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.remaining()?)?;
        self.stream.receive(buffer).map_err(translate)
    }
}

impl Write for TimedStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.remaining()?)?;
        self.stream.send(bytes).map_err(translate)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
