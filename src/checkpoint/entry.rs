//! Where a tensor lies inside a file, checked.

use std::ops::Range;
use std::path::Path;

use crate::checkpoint::pickle::printable;
use crate::checkpoint::source::rows_of;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape};

/// One tensor of one file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: DType,
    pub shape: Shape,
    /// Bytes within the file; as many as `shape` and `dtype` take.
    pub range: Range<usize>,
}

impl Entry {
    /// The shape of the rows `rows`, and the bytes where they lie. A number alone is one row.
    ///
    /// # Errors
    /// There are fewer; `place` is what the message names.
    pub(super) fn rows(
        &self,
        rows: &Range<usize>,
        place: impl Fn() -> String,
    ) -> Result<(Shape, Range<usize>)> {
        if self.shape.extents().is_empty() && *rows == (0..1) {
            return Ok((self.shape, self.range.clone()));
        }
        let shape = rows_of(self.shape, rows, &place())?;
        let row = self.range.len() / self.shape.extents().first().copied().unwrap_or(1).max(1);
        let start = self.range.start + rows.start * row;
        Ok((shape, start..start + rows.len() * row))
    }
}

/// `file: tensor name`, the place of a message.
pub(super) fn place(file: &Path, name: &str) -> String {
    format!("{}: {}", file.display(), printable(name))
}

/// The extents a file claims as a [`Shape`], with the bytes they take.
///
/// # Errors
/// More than four extents, or more elements than an address space holds.
pub(super) fn checked_shape(
    file: &Path,
    name: &str,
    extents: &[usize],
    dtype: DType,
) -> Result<(Shape, usize)> {
    let bytes = extents.iter().try_fold(dtype.size(), |n, &e| n.checked_mul(e));
    match bytes {
        Some(bytes) if extents.len() <= 4 && bytes <= isize::MAX as usize => Ok((Shape::new(extents), bytes)),
        _ => Err(Error::input(
            place(file, name),
            format!("the shape {:?}", &extents[..extents.len().min(8)]),
            "at most four extents that fit into memory",
            "the file is damaged: download it again",
        )),
    }
}
