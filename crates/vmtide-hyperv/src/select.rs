//! Tags of VMs. Hyper-V has no field for them that every administrator can set; the notes of a VM (`Set-VM -Notes`, or
//! its settings in Hyper-V Manager) are one: a line `vmtide:tag=nightly` in them, or several tags with commas.

use vmtide_cim::CimInstance;

/// What a line of the notes that is meant for vmtide begins with.
const LINE: &str = "vmtide:tag=";

/// The most tags that are read of one VM.
const MAX_TAGS: usize = 256;

/// The tags in the notes of a VM with these settings.
pub(crate) fn tags_of(settings: &CimInstance) -> Vec<String> {
    let notes = settings.texts("Notes").unwrap_or_default();
    tags_in(notes.iter().flat_map(|text| text.lines()))
}

fn tags_in<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let lists = lines.filter_map(|line| {
        let line = line.trim();
        let start = line.get(..LINE.len())?;
        start.eq_ignore_ascii_case(LINE).then(|| line.get(LINE.len()..)).flatten()
    });
    let tags = lists.flat_map(|list| list.split(',')).map(str::trim).filter(|tag| !tag.is_empty());
    tags.take(MAX_TAGS).map(ToOwned::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_lines_among_other_notes() {
        let notes = "Owner: Ann\n  VMtide:Tag=nightly, prod ,\nvmtide:tag=\nvmtide:tag=gold\nno vmtide:tag=x\nä";
        assert_eq!(tags_in(notes.lines()), ["nightly", "prod", "gold"]);
        assert!(tags_in("".lines()).is_empty());
    }
}
