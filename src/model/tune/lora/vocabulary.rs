//! Vocabularies of the two published revisions: the first had 20000 image tokens before the tokens of text.
//!
//! Row `20000 + i` of the first revision's embedding and head is row `i` of the later one's.

use crate::tensor::{DType, Shape, Tensor};

/// How many tokens the later revision cut from the front.
const IMAGE_TOKENS: usize = 20_000;

/// A tensor of an adapter that takes the place of one of the base's.
#[derive(Debug)]
pub(super) struct Replacement {
    tensor: Tensor,
    rows: Rows,
}

/// What becomes of the image tokens.
#[derive(Debug)]
enum Rows {
    Equal,
    /// The adapter's are left out.
    Cut,
    /// The base's stay.
    Kept,
}

/// `tensor` in the place of one of `shape`: of its very shape, or with the vocabulary of the other revision. Only matrices of
/// the embedding and the head can differ so: no other extent of the model is as large.
pub(super) fn fit(tensor: &Tensor, shape: Shape) -> Option<Replacement> {
    if !tensor.dtype().is_float() {
        return None;
    }
    let rows = match (tensor.shape().extents(), shape.extents()) {
        (is, want) if is == want => Rows::Equal,
        ([is, a], [want, b]) if a == b && *is == want + IMAGE_TOKENS => Rows::Cut,
        ([is, a], [want, b]) if a == b && is + IMAGE_TOKENS == *want => Rows::Kept,
        _ => return None,
    };
    let tensor = tensor.clone();
    Some(Replacement { tensor, rows })
}

impl Replacement {
    /// Does [`Replacement::over`] look at the base's own?
    pub fn needs_base(&self) -> bool {
        matches!(self.rows, Rows::Kept)
    }

    /// What is worth a line.
    pub fn notice(&self) -> Option<String> {
        let rows = self.tensor.extent(0);
        match self.rows {
            Rows::Equal => None,
            Rows::Cut => Some(format!(
                "{rows} rows, trained on the first revision: its first {IMAGE_TOKENS}, image tokens that this base has not, are left out"
            )),
            Rows::Kept => Some(format!(
                "{rows} rows, trained on the later revision: the first {IMAGE_TOKENS} rows of this base, image tokens, stay"
            )),
        }
    }

    /// [`Replacement::over`] of the rows (elements of a vector) from `first` on, of which `base` are the base's.
    pub fn over_rows(&self, first: usize, base: &Tensor) -> Tensor {
        let count = base.shape().extents()[0];
        match self.rows {
            Rows::Equal => self.tensor.rows(first..first + count),
            Rows::Cut => self
                .tensor
                .rows(first + IMAGE_TOKENS..first + IMAGE_TOKENS + count),
            Rows::Kept => {
                let mut rows = base.to_dtype(DType::F32);
                let kept = IMAGE_TOKENS.saturating_sub(first).min(count);
                if kept < count {
                    let start = first + kept - IMAGE_TOKENS;
                    let new = self.tensor.rows(start..start + count - kept).to_dtype(DType::F32);
                    let at = kept * self.tensor.extent(1);
                    rows.as_mut_slice::<f32>()[at..].copy_from_slice(new.as_slice::<f32>());
                }
                rows
            }
        }
    }

    /// What stands in the place of the base's tensor `base`, which is looked at (on the host) if [`Replacement::needs_base`]. In
    /// the file's type; in F32 where rows of the base stay.
    pub fn over(&self, base: &Tensor) -> Tensor {
        let (rows, width) = self.tensor.shape().rows_and_columns();
        let cut = IMAGE_TOKENS * width;
        match self.rows {
            Rows::Equal => self.tensor.clone(),
            Rows::Cut => {
                let dtype = self.tensor.dtype();
                let mut rest = Tensor::zeros(dtype, [rows - IMAGE_TOKENS, width]);
                rest.bytes_mut()
                    .copy_from_slice(&self.tensor.bytes()[cut * dtype.size()..]);
                rest
            }
            Rows::Kept => {
                let mut whole = base.to_dtype(DType::F32);
                let new = self.tensor.to_dtype(DType::F32);
                whole.as_mut_slice::<f32>()[cut..].copy_from_slice(new.as_slice::<f32>());
                whole
            }
        }
    }
}
