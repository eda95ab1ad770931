//! Faults that can be switched while the program under test runs.
//!
//! One `name = value` per line; values are numbers, also as `0x…`. The names:
//!
//! | name | effect |
//! |---|---|
//! | `open.error` | every open fails with this code |
//! | `open.parents_error` | opening a differencing disk fails with this code unless its parents are left out |
//! | `open.write_error` | opening for writing fails with this code, as for the disk of a running machine |
//! | `attach.error` | attaching fails with this code |
//! | `attach.handle_error` | attaching without a device fails with this code, so that the device is used |
//! | `attach.handle_unreadable` | not 0: a disk attached without a device has nothing to read |
//! | `create.error` | creating fails with this code |
//! | `create.pending` | creating goes on after its call, until its progress was asked for so often |
//! | `info.sector` | the logical sector that disks report |
//! | `tracking.id_length` | tracking ids are filled up with `x` to this many characters |
//! | `tracking.buffer` | the first answer about tracking says that the buffer is too small |
//! | `query.error` | asking for changes fails with this code |
//! | `query.capacity` | so many elements of the array are used before it counts as full |
//! | `query.processed` | the call says that it processed this many bytes |
//! | `query.short` | not 0: half of what was asked is processed |
//! | `query.count` | the call says that it filled this many elements |
//! | `query.every` | of every so many bytes the first half has changed, whatever was written |
//! | `query.outside` | not 0: one more range, past the end of the disk |

use std::collections::HashMap;

/// The faults that are on.
#[derive(Debug, Default)]
pub struct Faults(HashMap<String, u64>);

impl Faults {
    /// The faults of the file that `VMTIDE_STANDIN_FAULTS` names; none where it names none.
    pub fn now() -> Self {
        let text = std::env::var_os("VMTIDE_STANDIN_FAULTS")
            .and_then(|path| std::fs::read_to_string(path).ok());
        Self::parse(&text.unwrap_or_default())
    }

    /// The faults in a text; lines that are none are left out.
    pub fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let (name, value) = line.split_once('=')?;
            let value = value.trim();
            let number = match value.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => value.parse(),
            };
            Some((name.trim().to_owned(), number.ok()?))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// The value of a fault that is on.
    pub fn value(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// The value as an error code.
    pub fn code(&self, name: &str) -> Result<(), u32> {
        match self.value(name).and_then(|value| u32::try_from(value).ok()) {
            None | Some(0) => Ok(()),
            Some(code) => Err(code),
        }
    }

    /// Whether a switch is on.
    pub fn is_on(&self, name: &str) -> bool {
        self.value(name).is_some_and(|value| value != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_both_bases() {
        let faults =
            Faults::parse("query.error = 0xC03A0029\nquery.capacity=3\n\nnothing\nbad = x\noff=0");
        assert_eq!(faults.code("query.error"), Err(0xC03A_0029));
        assert_eq!(faults.value("query.capacity"), Some(3));
        assert_eq!(
            (faults.value("bad"), faults.is_on("off"), faults.is_on("query.capacity")),
            (None, false, true)
        );
        assert_eq!(faults.code("open.error"), Ok(()));
    }
}
