//! The names that a VM has in Bacula's catalogue.

use vmtide_engine::source::{SourceSpec, split_scheme};

/// The namespace of a source: what kind of platform it is.
pub fn namespace(source: &SourceSpec, text: &str) -> &'static str {
    let scheme = split_scheme(text).map_or("", |(scheme, _)| scheme);
    match (source, scheme) {
        (SourceSpec::Qemu(_), _) => "@qemu",
        (_, scheme) if scheme.starts_with("agent") || scheme.starts_with("hyperv") => "@hyperv",
        _ => "@image",
    }
}

/// A part of a path: what would change its structure is replaced.
pub fn component(name: &str) -> String {
    let clean: String = name
        .chars()
        .map(
            |letter| {
                if letter == '/' || letter == '\\' || letter.is_control() { '_' } else { letter }
            },
        )
        .collect();
    match clean.as_str() {
        "" | "." | ".." => format!("_{clean}"),
        _ => clean,
    }
}

/// The paths of one VM's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmPaths {
    directory: String,
}

impl VmPaths {
    /// Those of the VM `name` in `namespace`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { directory: format!("/{namespace}/{}", component(name)) }
    }

    /// The directory, with its slash.
    pub fn directory(&self) -> String {
        format!("{}/", self.directory)
    }

    /// The configuration.
    pub fn configuration(&self) -> String {
        format!("{}/configuration.json", self.directory)
    }

    /// A disk, as its bytes are.
    pub fn disk(&self, disk: &str) -> String {
        format!("{}/{}.raw", self.directory, component(disk))
    }

    /// The restore object with what a restore should know.
    pub fn object(&self) -> String {
        format!("{}/vmtide.json", self.directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below_their_namespace() {
        let paths = VmPaths::new("@qemu", "../web");
        assert_eq!(paths.disk("scsi0/1"), "/@qemu/.._web/scsi0_1.raw");
        assert_eq!(VmPaths::new("@image", "..").directory(), "/@image/_../");
        assert_eq!(VmPaths::new("@image", "a").configuration(), "/@image/a/configuration.json");
        let image = SourceSpec::Image("/a".into());
        assert_eq!(namespace(&image, "/a"), "@image");
        assert_eq!(namespace(&SourceSpec::Qemu(String::new()), "qemu+unix:///a"), "@qemu");
    }
}
