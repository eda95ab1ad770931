//! Which sectors of a file the grains of an extent take, for finding those that two take.

/// The most grains that are remembered, 16 bytes each. At 64 KiB grains this is half a terabyte.
const MAX_GRAINS: usize = 8 << 20;

/// The most overlaps that are told one by one.
const MAX_OVERLAPS: usize = 100;

/// The places of grains.
pub(super) struct Grains {
    grain_sectors: u64,
    places: Vec<(u64, u64)>,
    left_out: bool,
}

/// What the places say together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Use {
    /// The first sectors of grains that overlap.
    pub(super) overlaps: Vec<(u64, u64)>,
    /// The first sector that a grain takes.
    pub(super) first: Option<u64>,
    /// The first sector behind all grains.
    pub(super) end: Option<u64>,
    /// How many sectors the grains take.
    pub(super) sectors: u64,
    /// Whether there were few enough grains.
    pub(super) all_looked_at: bool,
}

impl Grains {
    pub(super) const fn new(grain_sectors: u64) -> Self {
        Self { grain_sectors, places: Vec::new(), left_out: false }
    }

    /// Remembers a grain from sector `start` up to and without `end`.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        // Grains that follow each other are one place; only whole ones, or a place would hide that
        // one of them is taken twice.
        if let Some(last) = self.places.last_mut()
            && last.1 == start
            && end - start == self.grain_sectors
        {
            last.1 = end;
        } else if self.places.len() < MAX_GRAINS {
            self.places.push((start, end));
        } else {
            self.left_out = true;
        }
    }

    /// Sorts the places and looks at neighbours.
    pub(super) fn overlaps(&mut self) -> Use {
        self.places.sort_unstable();
        let mut found = Use { all_looked_at: !self.left_out, ..Use::default() };
        let mut before: Option<(u64, u64)> = None;
        for (start, end) in &self.places {
            if let Some((first, reach)) = before
                && *start < reach
                && found.overlaps.len() < MAX_OVERLAPS
            {
                found.overlaps.push((first, *start));
            }
            found.first = found.first.or(Some(*start));
            found.sectors = found.sectors.saturating_add(end - start);
            let (first, reach) = before.unwrap_or((*start, *end));
            before = Some(if *end >= reach { (*start, *end) } else { (first, reach) });
        }
        found.end = before.map(|(_, reach)| reach);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_twice_is_found() {
        let mut grains = Grains::new(8);
        for start in [128, 136, 144, 200, 64] {
            grains.add(start, start + 8);
        }
        let found = grains.overlaps();
        assert_eq!((found.first, found.end, found.sectors), (Some(64), Some(208), 40));
        assert_eq!(found.overlaps, []);
        grains.add(140, 148);
        assert_eq!(grains.overlaps().overlaps, [(128, 140)]);
        assert_eq!(Grains::new(8).overlaps(), Use { all_looked_at: true, ..Use::default() });
    }
}
