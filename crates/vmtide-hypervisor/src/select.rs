//! Which VMs of many are meant: by name, id, wildcard, tag, or all.

use std::fmt;
use std::str::FromStr;

/// The word for all VMs.
const ALL: &str = "all";

/// What stands before a tag.
const TAG: &str = "tag:";

/// The longest selector in bytes; names of VMs have at most some hundred characters.
const MAX_SELECTOR_BYTES: usize = 4096;

/// Which VMs are meant, as a person writes it: `web1`, `web*`, a GUID, `tag:nightly`, `all`; several with commas.
///
/// A name or wildcard is compared with the VM's name without regard to case, and exactly with its id (with or
/// without braces). `*` stands for any characters and `?` for one; nothing else is special, so that names with
/// brackets can be written as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSelector {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    All,
    Tag(String),
    Pattern(String),
}

impl VmSelector {
    /// Whether it can mean more than one VM. A plain name is not: two VMs that share it are an error of the user's.
    pub fn is_many(&self) -> bool {
        match self.parts.as_slice() {
            [Part::Pattern(pattern)] => pattern.contains(['*', '?']),
            _ => true,
        }
    }

    /// Whether it means the VM of this name, id and tags.
    pub fn matches(&self, name: &str, id: Option<&str>, tags: &[String]) -> bool {
        self.parts.iter().any(|part| match part {
            Part::All => true,
            Part::Tag(tag) => tags.iter().any(|known| known.eq_ignore_ascii_case(tag)),
            Part::Pattern(pattern) => {
                let is_id = |id: &str| {
                    let bare = |text: &str| text.trim_matches(['{', '}']).to_lowercase();
                    bare(id) == bare(pattern)
                };
                id.is_some_and(is_id) || matches_wildcard(pattern, name)
            }
        })
    }
}

impl FromStr for VmSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_SELECTOR_BYTES {
            return Err(format!("a selection of VMs has at most {MAX_SELECTOR_BYTES} bytes"));
        }
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let parts: Vec<Part> = parts
            .map(|part| match part.strip_prefix(TAG) {
                Some("") => Err(format!("{text:?}: a tag follows {TAG}")),
                Some(tag) => Ok(Part::Tag(tag.into())),
                None if part == ALL || part == "*" => Ok(Part::All),
                None => Ok(Part::Pattern(part.into())),
            })
            .collect::<Result<_, _>>()?;
        if parts.is_empty() {
            return Err("no VM is named: give a name, an id, web*, tag:NAME or all".into());
        }
        Ok(Self { parts })
    }
}

impl fmt::Display for VmSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.parts.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match part {
                Part::All => write!(f, "{comma}{ALL}")?,
                Part::Tag(tag) => write!(f, "{comma}{TAG}{tag}")?,
                Part::Pattern(pattern) => write!(f, "{comma}{pattern}")?,
            }
        }
        Ok(())
    }
}

/// Whether `text` is as `pattern` says, where `*` is any characters and `?` is one. Time is at most the product of
/// the lengths: only the last `*` is ever gone back to.
fn matches_wildcard(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.to_lowercase().chars().collect();
    let text: Vec<char> = text.to_lowercase().chars().collect();
    let (mut at, mut position) = (0, 0);
    // The pattern behind the last star, and how much of the text it has swallowed.
    let mut star: Option<(usize, usize)> = None;
    while position < text.len() {
        match pattern.get(at) {
            Some('*') => {
                at += 1;
                star = Some((at, position));
            }
            Some(c) if *c == '?' || text.get(position) == Some(c) => {
                at += 1;
                position += 1;
            }
            _ => match star {
                Some((behind, swallowed)) => {
                    at = behind;
                    position = swallowed + 1;
                    star = Some((behind, position));
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(at).all(|c| *c == '*')
}

/// The volume that a disk lies on, as far as its path tells: a drive (`C:`), a cluster shared volume
/// (`C:\ClusterStorage\Volume1`), a share (`\\server\share`), or else the first directory. In lower case.
pub fn volume_of(path: &str) -> String {
    let path = path.to_lowercase().replace('/', r"\");
    let take = |prefix: &str, rest: &str, parts: usize| {
        let parts: Vec<&str> = rest.split('\\').take(parts).collect();
        format!("{prefix}{}", parts.join(r"\"))
    };
    if let Some(rest) = path.strip_prefix(r"\\") {
        return take(r"\\", rest, 2);
    }
    let mut parts = path.split('\\');
    let drive = parts.next().unwrap_or_default();
    match parts.next() {
        Some("clusterstorage") => take("", &path, 3),
        Some(first) if drive.is_empty() => format!(r"\{first}"),
        _ => drive.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(text: &str) -> VmSelector {
        text.parse().unwrap()
    }

    #[test]
    fn vms_are_chosen_by_name_wildcard_id_and_tag() {
        let id = "1B4E28BA-2FA1-11D2-883F-0016D3CCA427";
        let tags = ["nightly".to_owned()];
        let means = |text: &str, name: &str| selector(text).matches(name, Some(id), &tags);
        for (text, name) in [
            ("web1", "Web1"),
            ("web*", "web"),
            ("*b?", "web1"),
            ("a,web1", "web1"),
            ("{1b4e28ba-2fa1-11d2-883f-0016d3cca427}", "x"),
            ("tag:Nightly", "x"),
            ("all", "x"),
            ("*", "x"),
            ("db [1]", "DB [1]"),
            ("*a*a*b", "aaaaaab"),
        ] {
            assert!(means(text, name), "{text} {name}");
        }
        for (text, name) in
            [("web", "web1"), ("web?", "web"), ("tag:daily", "x"), ("w[eb]*", "web")]
        {
            assert!(!means(text, name), "{text} {name}");
        }
        assert!(!selector("web1").is_many() && !selector(id).is_many());
        assert!(["web*", "tag:x", "all", "a,b"].iter().all(|text| selector(text).is_many()));
        assert!(["", " , ", "tag:"].iter().all(|text| text.parse::<VmSelector>().is_err()));
        assert_eq!(selector("web*, tag:x,*").to_string(), "web*,tag:x,all");
    }

    #[test]
    fn a_hostile_pattern_takes_no_time() {
        let pattern = "*a".repeat(1000);
        assert!(!selector(&pattern).matches(&"b".repeat(10_000), None, &[]));
        assert!("x".repeat(5000).parse::<VmSelector>().is_err());
    }

    #[test]
    fn volumes_are_told_by_paths() {
        for (path, volume) in [
            (r"C:\VMs\a.vhdx", "c:"),
            (r"c:\ClusterStorage\Volume2\a\b.vhdx", r"c:\clusterstorage\volume2"),
            (r"\\NAS\vms\a\b.vhdx", r"\\nas\vms"),
            ("/vms/a.qcow2", r"\vms"),
            ("", ""),
        ] {
            assert_eq!(volume_of(path), volume, "{path}");
        }
    }
}
