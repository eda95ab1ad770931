//! A password, which is never shown and does not stay in memory.

use zeroize::{Zeroize, ZeroizeOnDrop};

/// A password or passphrase: any bytes, overwritten when dropped, never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Password(Vec<u8>);

impl Password {
    /// The password of these bytes, taken as they are: no trimming, no Unicode normalisation.
    /// Whoever reads it from a file or a terminal removes the end of the line.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes, for the key derivation alone.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Password(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown() {
        let shown = format!("{:?} {:#?}", Password::new("hunter2"), Password::new("hunter2"));
        assert_eq!(shown, "Password(secret) Password(secret)");
    }
}
