//! Names in images that Windows would look up outside of the local file systems, told by their text alone.
//!
//! An image's author chooses the names in it. To open `\\server\share\x`, even only to see whether it is there,
//! Windows logs in to that server with the credentials of the user or of the machine: an image from
//! anywhere could collect them. `\\.\pipe\x`, `\??\…` and `CON` are no files at all. So such names are refused
//! before anything touches them. Sources: "Naming Files, Paths, and Namespaces" and "File path
//! formats on Windows systems" (learn.microsoft.com).
//!
//! Text goes in, so that it is the same everywhere and tested everywhere; only on Windows it is asked.

/// Names that mean a device in every directory, whatever extension follows.
const DEVICES: [&str; 6] = ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"];

/// Whether `name`, in an image that lies in `directory`, leads to another machine or to a device. A share on which
/// the image itself lies is none of these where the name begins with that directory: it is in use anyway.
pub(crate) fn leads_elsewhere(name: &str, directory: &str) -> bool {
    let name = name.replace('/', "\\");
    let directory = directory.replace('/', "\\");
    let beside = inside(&name, directory.trim_end_matches('\\'));
    let is_rooted_elsewhere = name.starts_with("\\\\") || name.starts_with("\\??");
    (is_rooted_elsewhere && beside.is_none()) || beside.unwrap_or(&name).split('\\').any(is_device)
}

/// What follows the directory in `name`, where it begins with that and goes nowhere up.
fn inside<'a>(name: &'a str, directory: &str) -> Option<&'a str> {
    let head = name.get(..directory.len()).filter(|head| !head.is_empty())?;
    let rest = name.get(directory.len()..)?.strip_prefix('\\')?;
    let goes_up = rest.split('\\').any(|part| part.starts_with(".."));
    (head.eq_ignore_ascii_case(directory) && !goes_up).then_some(rest)
}

/// Whether one name of a path means a device: dots and spaces behind it do not count, nor do extensions.
pub(crate) fn is_device(name: &str) -> bool {
    let base = name.split(['.', ':']).next().unwrap_or_default().trim_matches(' ').to_uppercase();
    let mut characters = base.chars();
    let last = characters.next_back();
    let is_port = matches!(characters.as_str(), "COM" | "LPT")
        && last.is_some_and(|digit| digit.is_ascii_digit() || "¹²³".contains(digit));
    is_port || DEVICES.contains(&base.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_machines_and_devices_are_told_by_their_names() {
        for name in [
            r"\\203.0.113.5\s\x.qcow2",
            "//203.0.113.5/s/x.qcow2",
            r"\/203.0.113.5\s\x.qcow2",
            r"\\203.0.113.5@8080\dav\x.qcow2",
            r"\\?\UNC\203.0.113.5\s\x.qcow2",
            r"\\?\GLOBALROOT\Device\Mup\203.0.113.5\s\x",
            r"\\.\UNC\203.0.113.5\s\x.qcow2",
            r"\\.\pipe\x",
            r"\\.\PhysicalDrive0",
            r"\??\UNC\203.0.113.5\s\x",
            "/??/UNC/203.0.113.5/s/x",
            r"\\",
            "CON",
            "nul.qcow2",
            r"a\AUX .txt",
            "sub/com1.vmdk",
            "LPT².vmdk",
            "conin$",
        ] {
            assert!(leads_elsewhere(name, r"C:\VMs"), "{name}");
            assert!(leads_elsewhere(name, r"\\files\vms\web"), "{name}");
        }
    }

    #[test]
    fn files_of_local_disks_and_beside_the_image_are_none() {
        for name in [
            "base.qcow2",
            "./base.qcow2",
            r".\sub\base.qcow2",
            "../base.qcow2",
            "C:/VMs/base.qcow2",
            r"D:\base.qcow2",
            "/VMs/base.qcow2",
            r"\VMs\base.qcow2",
            "console.qcow2",
            "COM.vmdk",
            "com10.vmdk",
            "base.con",
            "",
        ] {
            assert!(!leads_elsewhere(name, r"C:\VMs"), "{name}");
        }
    }

    #[test]
    fn a_share_on_which_the_image_lies_is_used_anyway() {
        let directory = r"\\files\vms\web";
        assert!(!leads_elsewhere(r"\\files\vms\web\base.qcow2", directory));
        assert!(!leads_elsewhere("//FILES/vms/Web/base.qcow2", directory));
        assert!(!leads_elsewhere(r"\\files\vms\base.qcow2", r"\\files\vms\"));
        assert!(leads_elsewhere(r"\\files\vms\web2\base.qcow2", directory));
        assert!(leads_elsewhere(r"\\files\vms\web", directory));
        assert!(leads_elsewhere(r"\\files\vms\web\..\..\..\other\x", directory));
        assert!(leads_elsewhere(r"\\files\vms\web\NUL", directory));
        assert!(leads_elsewhere(r"\\other\s\x", ""));
        assert!(leads_elsewhere(r"\\other\s\x", r"\"));
    }
}
