//! Mapping pairs: the runs of a stream.

/// Clusters that are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// None for a hole.
    pub(super) first_cluster: Option<u64>,
    pub(super) count: u64,
}

/// Decodes them until their end, or what makes no sense.
pub(super) fn runs(mut mapping: &[u8]) -> Vec<Run> {
    let mut found = Vec::new();
    let mut cluster = 0_i64;
    while let Some((head, rest)) = mapping.split_first().filter(|(head, _)| **head != 0) {
        let (count_bytes, place_bytes) = (usize::from(head & 15), usize::from(head >> 4));
        let Some((count, rest)) = rest.split_at_checked(count_bytes) else { break };
        let Some((place, rest)) = rest.split_at_checked(place_bytes) else { break };
        let Some(count) = signed(count).and_then(|count| u64::try_from(count).ok()) else { break };
        let first_cluster = match place {
            [] => None,
            place => {
                let Some(next) = signed(place).and_then(|step| cluster.checked_add(step)) else {
                    break;
                };
                cluster = next;
                // Below the beginning there is nothing.
                let Ok(first) = u64::try_from(cluster) else { break };
                Some(first)
            }
        };
        found.push(Run { first_cluster, count });
        mapping = rest;
    }
    found
}

/// A little-endian number of up to eight bytes with a sign.
fn signed(bytes: &[u8]) -> Option<i64> {
    let filler = if bytes.last()? & 0x80 == 0 { 0 } else { 0xFF };
    let mut whole = [filler; 8];
    whole.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(i64::from_le_bytes(whole))
}

#[cfg(test)]
mod tests {
    use super::{Run, runs};

    #[test]
    fn runs_count_from_the_one_before() {
        // 0x30 clusters at 0x20, a hole of 0x10, 0x18 clusters 0x12 before the first.
        let mapping = [0x11, 0x30, 0x20, 0x01, 0x10, 0x11, 0x18, 0xEE, 0, 0xFF];
        let run = |first_cluster, count| Run { first_cluster, count };
        assert_eq!(runs(&mapping), [run(Some(0x20), 0x30), run(None, 0x10), run(Some(0x0E), 0x18)]);
    }

    #[test]
    fn what_makes_no_sense_ends_them() {
        // Cut, before the beginning, a count below zero, numbers too long.
        for mapping in [&[0x21, 0x30, 0x20][..], &[0x11, 0x30, 0xF0], &[0x11, 0x80, 1], &[0xFF; 40]]
        {
            assert_eq!(runs(mapping), [], "{mapping:x?}");
        }
    }
}
