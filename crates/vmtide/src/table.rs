//! Plain tables for people: columns as wide as their content, no frames, so that they can be cut
//! and grepped.

/// Rows of text under a heading. Columns whose heading begins with `>` are aligned to the right.
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub fn new(headings: &[&str]) -> Self {
        let titles = headings.iter().map(|title| title.trim_start_matches('>').to_owned());
        Self {
            right: headings.iter().map(|title| title.starts_with('>')).collect(),
            rows: vec![titles.collect()],
        }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The lines, without spaces at their ends.
    pub fn lines(&self) -> Vec<String> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.right.len()).map(width).collect();
        let cell = |(column, text): (usize, &String)| {
            let width = widths.get(column).copied().unwrap_or(0);
            if self.right.get(column).copied().unwrap_or(false) {
                format!("{text:>width$}")
            } else {
                format!("{text:<width$}")
            }
        };
        let line = |row: &Vec<String>| {
            let cells: Vec<_> = row.iter().enumerate().map(cell).collect();
            cells.join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["name", ">size", "note"]);
        table.row(["a".into(), "10".into(), String::new()]);
        table.row(["longer".into(), "2000".into(), "x".into()]);
        assert_eq!(table.lines(), ["name    size  note", "a         10", "longer  2000  x"]);
    }
}
