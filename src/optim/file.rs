//! The state on disk.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::pages::Pages;
use super::state::Part;
use super::{OptimizerKind, Trained};
use crate::checkpoint::{SafetensorsWriter, read_metadata, read_tensors, refuse_non_finite};
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// The key of the file's metadata that names the kind.
const KIND: &str = "optim";
const REMEDY: &str = "resume with the model and the flags that the run was started with";

/// The tensor of a part: the parameter's shape, but for scales.
fn shape_of(t: &Trained, part: &Part) -> Shape {
    match part.per {
        1 => t.shape,
        _ => [part.elements(t.shape.elements())].into(),
    }
}

/// The last page that was read: those of a parameter's parts follow each other.
#[derive(Default)]
struct Read<'p>(Option<(usize, Vec<Cow<'p, Tensor>>)>);

impl<'p> Read<'p> {
    fn page(&mut self, pages: &'p Pages, number: usize) -> Result<&[Cow<'p, Tensor>]> {
        if self.0.as_ref().is_none_or(|(held, _)| *held != number) {
            // The one before goes first.
            self.0 = None;
            self.0 = Some((number, pages.read(number)?));
        }
        Ok(self.0.as_ref().map_or(&[], |(_, parts)| parts))
    }
}

pub(super) fn save(
    path: &Path,
    kind: OptimizerKind,
    step: u64,
    trained: &[Trained],
    pages: &Pages,
) -> Result<()> {
    let mut specs = vec![("step".to_string(), DType::I64, Shape::new(&[1]))];
    for t in trained {
        for part in t.format.parts() {
            specs.push((format!("{}.{}", part.name, t.name), part.dtype, shape_of(t, part)));
        }
    }
    let metadata = BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        (KIND.to_string(), kind.name().to_string()),
    ]);
    let mut file = SafetensorsWriter::create(path, &specs, &metadata)?;
    file.write("step", &(step as i64).to_le_bytes())?;
    let mut read = Read::default();
    for (number, t) in trained.iter().enumerate() {
        for (i, part) in t.format.parts().iter().enumerate() {
            let mut failed = None;
            let written = file.write_from(&format!("{}.{}", part.name, t.name), |out| {
                for (page, piece) in pages.pieces_of(number) {
                    let parts = read.page(pages, page).map_err(|error| {
                        failed = Some(error);
                        io::Error::other("a copy from the device failed")
                    })?;
                    out.write_all(&parts[i].bytes()[bytes_of(part, piece.state_at, piece.len)])?;
                }
                Ok(())
            });
            match failed {
                Some(error) => return Err(error),
                None => written?,
            }
        }
    }
    file.finish()
}

/// Where the part of `len` elements from `at` on lies, in bytes.
fn bytes_of(part: &Part, at: usize, len: usize) -> std::ops::Range<usize> {
    let size = part.dtype.size();
    at / part.per * size..part.elements(at + len) * size
}

/// Fills the states; the result is the number of steps taken.
pub(super) fn load(path: &Path, kind: OptimizerKind, trained: &[Trained], pages: &mut Pages) -> Result<u64> {
    let mut tensors = read_tensors(path)?;
    let metadata = read_metadata(path)?;
    // Files of the first version, which had one optimizer, do not name it.
    let found = metadata.get(KIND).map_or("adamw", String::as_str);
    if found != kind.name() {
        let found = format!("the state of optimizer {found}");
        let expected = format!("that of {}", kind.name());
        return Err(Error::input(path.display(), found, expected, REMEDY));
    }
    let mut take = |name: &str, dtype: DType, shape: Shape| -> Result<Tensor> {
        let place = format!("{}: {name}", path.display());
        let found = tensors
            .remove(name)
            .ok_or_else(|| Error::input(&place, "nothing", "a tensor", REMEDY))?;
        if (found.dtype(), found.shape()) != (dtype, shape) {
            let is = format!("{} {}", found.dtype(), found.shape());
            return Err(Error::input(place, is, format!("{dtype} {shape}"), REMEDY));
        }
        Ok(found)
    };
    let step = take("step", DType::I64, [1].into())?.as_slice::<i64>()[0];
    let step = u64::try_from(step)
        .map_err(|_| Error::input(format!("{}: step", path.display()), step, "a step from 0", REMEDY))?;
    // Everything is checked before anything is changed.
    let mut read: Vec<Vec<Tensor>> = Vec::new();
    for t in trained {
        let mut parts = Vec::new();
        for part in t.format.parts() {
            let name = format!("{}.{}", part.name, t.name);
            let tensor = take(&name, part.dtype, shape_of(t, part))?;
            let place = format!("{}: {name}", path.display());
            refuse_non_finite(&place, &tensor)?;
            if part.is_magnitude {
                refuse_negative(&place, tensor.as_slice())?;
            }
            parts.push(tensor);
        }
        read.push(parts);
    }
    if let Some(name) = tensors.keys().next() {
        return Err(Error::input(
            path.display(),
            format!("{name}, which belongs to nothing that trains now"),
            format!("the state of {} parameters", trained.len()),
            REMEDY,
        ));
    }
    pages.write(|pieces, state| {
        for piece in pieces {
            let parts = trained[piece.param].format.parts().iter();
            for ((part, from), to) in parts.zip(&read[piece.param]).zip(&mut *state) {
                let from = &from.bytes()[bytes_of(part, piece.at, piece.len)];
                to.bytes_mut()[bytes_of(part, piece.state_at, piece.len)].copy_from_slice(from);
            }
        }
    })?;
    Ok(step)
}

fn refuse_negative(place: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|&x| x < 0.0) {
        None => Ok(()),
        Some(i) => Err(Error::input(
            format!("{place}[{i}]"),
            values[i],
            "a number from 0",
            "the file is damaged: resume from another checkpoint",
        )),
    }
}
