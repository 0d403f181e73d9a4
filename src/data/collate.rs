//! Samples and prompts as padded batches, with the positions of the official code.
//!
//! With the context length c (index of the first `<sop>`) and the index m of the mask token, token i is at position i
//! and block position 0 before c, at position m and block position i - c + 1 from c on. What counts as i differs: the
//! model counts all ids, padding included; the tokenizer counts from the first id that is not left padding, and puts
//! padding at 0, 0.

use super::batch::{Batch, IGNORE, Span};
use super::sample::Sample;
use crate::error::{Error, Result};
use crate::tokenizer::Special;

/// Where one sequence starts, where its context ends, and where what is generated stands.
#[derive(Clone, Copy)]
struct Anchor {
    start: usize,
    context: usize,
    /// Without a mask token positions go on counting.
    mask: Option<usize>,
}

impl Anchor {
    fn position(self, i: usize) -> [i32; 2] {
        if i < self.start {
            [0, 0]
        } else if i < self.context {
            [(i - self.start) as i32, 0]
        } else {
            // A mask token in the padding cannot be, but a file may say so.
            let position = self.mask.unwrap_or(i).saturating_sub(self.start);
            [position as i32, (i - self.context + 1) as i32]
        }
    }
}

/// An empty batch of `size` rows of `len`.
fn empty(size: usize, len: usize) -> Batch {
    Batch {
        size,
        len,
        ids: Vec::with_capacity(size * len),
        labels: Vec::with_capacity(size * len),
        positions: Vec::with_capacity(size * len * 2),
        spans: Vec::with_capacity(size),
    }
}

/// Adds one row: `ids` and `labels` with `left` padding before and as much as is missing after.
fn push(batch: &mut Batch, ids: &[u32], labels: &[i32], left: usize, pad: u32, anchor: Anchor) {
    let to = batch.ids.len() + batch.len;
    batch.ids.resize(to - batch.len + left, pad as i32);
    batch.ids.extend(ids.iter().map(|&id| id as i32));
    batch.ids.resize(to, pad as i32);
    batch.labels.resize(to - batch.len + left, IGNORE);
    batch.labels.extend_from_slice(labels);
    batch.labels.resize(to, IGNORE);
    batch
        .positions
        .extend((0..batch.len).flat_map(|i| anchor.position(i)));
    batch.spans.push(Span {
        start: anchor.start,
        context: anchor.context,
    });
}

/// A training batch: padded on the right with `pad`, unsupervised, to the longest sample or to `pad_to` if that is
/// more. Positions as the model derives them: they go on over the padding, which nothing before it can see.
pub fn right_pad(samples: &[&Sample], pad: u32, pad_to: Option<usize>) -> Batch {
    let longest = samples
        .iter()
        .map(|sample| sample.ids.len())
        .max()
        .unwrap_or_default();
    let mut batch = empty(samples.len(), longest.max(pad_to.unwrap_or_default()));
    for sample in samples {
        let anchor = Anchor {
            start: 0,
            context: sample.context,
            mask: Some(sample.mask),
        };
        push(&mut batch, &sample.ids, &sample.labels, 0, pad, anchor);
    }
    batch
}

/// A batch to generate from: prompts that end in `[gMASK] <sop>`, padded on the left to the longest; padding takes no
/// part. What is generated stands at the first `[gMASK]`, as in training.
pub fn left_pad(prompts: &[Vec<u32>], special: &Special) -> Batch {
    let len = prompts.iter().map(Vec::len).max().unwrap_or_default();
    let mut batch = empty(prompts.len(), len);
    for ids in prompts {
        let left = len - ids.len();
        let find = |id| Some(left + ids.iter().position(|&x| x == id)?);
        let mask = find(special.gmask).or_else(|| find(special.mask));
        let anchor = Anchor {
            start: left,
            context: find(special.sop).unwrap_or(len),
            mask,
        };
        push(&mut batch, ids, &[], left, special.pad, anchor);
    }
    batch
}

/// Rows of equal length as the model takes them when it gets nothing but ids: padding is counted and seen, what is
/// generated stands at the first `[gMASK]`, or the first `[MASK]` where there is none. `labels` may be empty.
///
/// # Errors
/// Rows of unequal length; a row without `<sop>` or mask token.
pub fn from_ids_model(ids: &[Vec<u32>], labels: &[Vec<i32>], special: &Special) -> Result<Batch> {
    from_ids(ids, labels, special, |row| {
        let find = |id| row.iter().position(|&x| x == id);
        let context = find(special.sop).ok_or(("<sop>", special.sop))?;
        let mask = find(special.gmask)
            .or_else(|| find(special.mask))
            .ok_or(("[gMASK]", special.gmask))?;
        Ok(Anchor {
            start: 0,
            context,
            mask: Some(mask),
        })
    })
}

/// Rows of equal length, padded on the left, as the official tokenizer's `_pad` describes them: padding is neither
/// counted nor seen, what is generated stands at the first `[MASK]`, or the first `[gMASK]` where there is none (the
/// opposite of the model); without `<sop>` everything is context. `labels` may be empty.
///
/// # Errors
/// Rows of unequal length.
pub fn from_ids_tokenizer(ids: &[Vec<u32>], labels: &[Vec<i32>], special: &Special) -> Result<Batch> {
    from_ids(ids, labels, special, |row| {
        let find = |id| row.iter().position(|&x| x == id);
        let start = row.iter().position(|&id| id != special.pad).unwrap_or(row.len());
        let mask = find(special.mask).or_else(|| find(special.gmask));
        Ok(Anchor {
            start,
            context: find(special.sop).unwrap_or(row.len()),
            mask,
        })
    })
}

fn from_ids(
    ids: &[Vec<u32>],
    labels: &[Vec<i32>],
    special: &Special,
    anchor: impl Fn(&[u32]) -> Result<Anchor, (&'static str, u32)>,
) -> Result<Batch> {
    let len = ids.first().map_or(0, Vec::len);
    let mut batch = empty(ids.len(), len);
    for (i, row) in ids.iter().enumerate() {
        let place = format!("row {i} of the batch");
        let labels = labels.get(i).map_or(&[][..], Vec::as_slice);
        if row.len() != len || labels.len() > len {
            let found = format!("{} ids and {} labels", row.len(), labels.len());
            return Err(Error::input(
                place,
                found,
                format!("{len} of each"),
                "pad the rows",
            ));
        }
        let anchor = anchor(row).map_err(|(name, id)| {
            Error::input(
                place,
                format!("no {name}"),
                format!("its id {id}"),
                "use the tokenizer of this model",
            )
        })?;
        push(&mut batch, row, labels, 0, special.pad, anchor);
    }
    Ok(batch)
}
