//! The batch: what the model sees of the data.

/// The label of a token that is not supervised, as in PyTorch and Hugging Face.
pub const IGNORE: i32 = -100;

/// What of one sequence is visible to whom.
///
/// Key `j` is visible to query `i` when both are at least `start` and `j < context || j <= i`: the context is
/// bidirectional, the rest causal, left padding takes no part. A query that sees nothing (padding) attends uniformly
/// over all keys, as the official `masked_fill(-10000)` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the first token that is not left padding.
    pub start: usize,
    /// Context length: index of `<sop>` in the padded sequence.
    pub context: usize,
}

/// `size` sequences of one padded length `len`; every array is row-major `[size, len]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Number of sequences B.
    pub size: usize,
    /// Padded length S of each.
    pub len: usize,
    /// Token ids, `[B, S]`.
    pub ids: Vec<i32>,
    /// `labels[b, t]` is `ids[b, t]` where the token is supervised, else [`IGNORE`]. Not shifted: the model predicts
    /// `labels[b, t + 1]` at `t`, so `labels[b, 0]` never counts.
    pub labels: Vec<i32>,
    /// Position and block position of each token, `[B, S, 2]`.
    pub positions: Vec<i32>,
    /// Visibility of each sequence, `[B]`.
    pub spans: Vec<Span>,
}

impl Batch {
    /// The number of supervised tokens.
    pub fn supervised(&self) -> usize {
        self.labels
            .chunks_exact(self.len)
            .map(|row| row[1..].iter().filter(|&&label| label != IGNORE).count())
            .sum()
    }
}
