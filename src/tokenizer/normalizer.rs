//! The normaliser of SentencePiece: a table of replacements (`nmt_nfkc`), then spaces.
//!
//! The crate `tokenizers` applies the same table per grapheme and takes the shortest match; SentencePiece takes the
//! longest match at every position ("ﾊﾞ" is "バ", not "ハ" and a lone mark), so this is our own.

use super::unigram::Trie;

/// How SentencePiece writes a space.
pub const SPACE: char = '\u{2581}';

/// The precompiled table of replacements: a double array over the keys' bytes (the layout of darts-clone), whose
/// values are offsets into a block of NUL-terminated replacements.
pub struct Charsmap {
    units: Vec<u32>,
    replacements: String,
}

fn has_leaf(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

fn is_leaf(unit: u32) -> bool {
    unit >> 31 == 1
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

impl Charsmap {
    /// Reads `u32 size | double array of size bytes | replacements`; an empty table replaces nothing. On failure says
    /// what is wrong with it.
    pub fn parse(blob: &[u8]) -> Result<Self, String> {
        if blob.is_empty() {
            return Ok(Self {
                units: Vec::new(),
                replacements: String::new(),
            });
        }
        let (size, rest) = blob
            .split_first_chunk()
            .ok_or("a charsmap of less than 4 bytes")?;
        let size = u32::from_le_bytes(*size) as usize;
        if !size.is_multiple_of(4) || size > rest.len() {
            return Err(format!(
                "a charsmap whose trie takes {size} of {} bytes",
                rest.len()
            ));
        }
        let (trie, replacements) = rest.split_at(size);
        let units = trie
            .as_chunks()
            .0
            .iter()
            .map(|unit| u32::from_le_bytes(*unit))
            .collect::<Vec<_>>();
        let replacements = String::from_utf8(replacements.to_vec())
            .map_err(|e| format!("charsmap replacements with {e}"))?;
        for (i, &unit) in units.iter().enumerate() {
            if !is_leaf(unit) && has_leaf(unit) {
                let leaf = units.get(i ^ offset(unit)).copied().filter(|&leaf| is_leaf(leaf));
                let start =
                    leaf.ok_or_else(|| format!("a charsmap whose unit {i} lacks its leaf"))? & !(1 << 31);
                if replacements.get(start as usize..).is_none() {
                    return Err(format!(
                        "a charsmap whose unit {i} points outside the replacements"
                    ));
                }
            }
        }
        Ok(Self { units, replacements })
    }

    /// The longest key that `text` starts with: its length in bytes and what replaces it.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let mut found = None;
        let mut node = offset(*self.units.first()?);
        for (i, &byte) in text.as_bytes().iter().enumerate() {
            node ^= usize::from(byte);
            match self.units.get(node) {
                Some(&unit) if unit & (1 << 31 | 0xff) == u32::from(byte) => {
                    node ^= offset(unit);
                    if has_leaf(unit) && text.is_char_boundary(i + 1) {
                        found = Some((i + 1, self.units[node] & !(1 << 31)));
                    }
                }
                _ => break,
            }
        }
        let (length, start) = found?;
        let replacement = &self.replacements[start as usize..];
        Some((length, replacement.split('\0').next().unwrap_or(replacement)))
    }
}

/// Normalises `text` as the official model asks for: user-defined pieces (`keep`) stay as they are, everything else is
/// replaced by the table; spaces are written [`SPACE`], runs of them collapsed, those at both ends removed, and one
/// put in front of all. A text of nothing but spaces is empty.
pub fn normalize(text: &str, charsmap: &Charsmap, keep: &Trie) -> String {
    let mut out = String::with_capacity(text.len() + SPACE.len_utf8());
    out.push(SPACE);
    // The space just put in front counts as one: those that lead the text fall away.
    let mut after_space = true;
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let (length, new) = match keep.prefixes(rest.as_bytes()).last() {
            Some((length, _)) => (length, &rest[..length]),
            None => {
                let length = character.len_utf8();
                charsmap.longest(rest).unwrap_or((length, &rest[..length]))
            }
        };
        rest = &rest[length..];
        let new = if after_space {
            new.trim_start_matches(' ')
        } else {
            new
        };
        if !new.is_empty() {
            out.extend(new.chars().map(|c| if c == ' ' { SPACE } else { c }));
            after_space = new.ends_with(' ');
        }
    }
    out.truncate(out.trim_end_matches(SPACE).len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> String {
        let keep = Trie::new(vec![("<n>".as_bytes(), 0)]).ok().unwrap();
        normalize(text, &Charsmap::parse(&[]).unwrap(), &keep)
    }

    #[test]
    fn spaces_collapse_and_one_leads() {
        assert_eq!(plain("  a  b c "), "▁a▁b▁c");
        assert_eq!(plain("   "), "");
        assert_eq!(plain(""), "");
        assert_eq!(plain(" <n> <n>x"), "▁<n>▁<n>x");
    }

    #[test]
    fn a_broken_table_is_refused() {
        assert!(Charsmap::parse(&[1, 0]).is_err());
        assert!(Charsmap::parse(&[8, 0, 0, 0, 1, 2, 3, 4]).is_err());
        assert!(Charsmap::parse(&[3, 0, 0, 0, 1, 2, 3]).is_err());
        // One unit that claims a leaf where there is none.
        assert!(Charsmap::parse(&[4, 0, 0, 0, 0, 1, 0, 0, b'x', 0]).is_err());
        // A replacement that is not UTF-8.
        assert!(Charsmap::parse(&[4, 0, 0, 0, 0, 0, 0, 0, 0xff, 0]).is_err());
    }
}
