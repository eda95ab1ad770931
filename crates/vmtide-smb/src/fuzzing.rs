//! What the fuzz target and the tests feed: messages of a server.

use crate::header::ResponseHeader;
use crate::requests::read_list;
use crate::{PathMap, negotiate, session};

/// Reads `data` as every kind of answer: nothing may panic, and nothing is allocated by a length that was not checked.
pub fn answers(data: &[u8]) {
    if let Ok(header) = ResponseHeader::decode(data) {
        drop(negotiate::response(data, &header));
    }
    drop(session::setup_answer(data));
    let mut found = Vec::new();
    if read_list(data, &mut found).is_ok() {
        assert!(found.len() <= data.len() / 64 + 1, "more files than there is room for");
        assert!(found.iter().all(|file| !file.name.contains(['\\', '/'])));
    }
    if let Ok(path) = std::str::from_utf8(data)
        && let Ok(found) = PathMap::new("hv1").locate(path)
    {
        // Whatever the name was, nobody else is asked.
        assert!(found.server.eq_ignore_ascii_case("hv1"), "{path:?} leads to {found}");
        assert!(!found.path.split('\\').any(|part| part == ".."), "{path:?} goes up: {found}");
    }
}

#[cfg(test)]
mod tests {
    use super::answers;

    #[test]
    fn seeds_and_mutations_of_them_do_no_harm() {
        let mut negotiated = b"\xfeSMB\x40\0".to_vec();
        negotiated.resize(16, 0);
        negotiated.push(1);
        negotiated.resize(64, 0);
        negotiated.extend([65, 0, 3, 0, 0x11, 3, 2, 0]);
        negotiated.resize(64 + 24, 0);
        negotiated.extend([4, 0, 0, 0, 0, 0, 16, 0, 0, 0, 16, 0, 0, 0, 16, 0]);
        negotiated.resize(64 + 60, 0);
        negotiated.extend([128, 0, 0, 0, 1, 0, 6, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        negotiated.extend([2, 0, 4, 0, 0, 0, 0, 0, 1, 0, 2, 0]);
        let mut list = vec![0; 64];
        list[60] = 2;
        list.extend(*b"a\0");
        for seed in [&negotiated[..], &list, br"C:\VMs\..\x.vhdx", br"\\hv1\a\b"] {
            answers(seed);
            for at in 0..seed.len() {
                for value in [0, 1, 0x7f, 0xff] {
                    let mut changed = seed.to_vec();
                    changed[at] = value;
                    answers(&changed);
                    answers(&changed[..at]);
                }
            }
        }
    }
}
