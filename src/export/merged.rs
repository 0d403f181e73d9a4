//! A base with adapters in it, as weights by name.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::checkpoint::quantized::is_quantized_linear;
use crate::checkpoint::{LM_HEAD, Source, Stored, WORD_EMBEDDINGS, refuse_non_finite};
use crate::error::{Error, Result};
use crate::model::config::{Linears, ModelConfig};
use crate::model::tune::Merger;
use crate::quant::{Absmax, QuantTensor, QuantType, RowInt8};
use crate::tensor::{DType, Shape, Tensor};

/// What W is in `W + s B A`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// The base as it was published: what LoRA on dense weights trained on.
    Original,
    /// What is left of the base's linears after 4 bits, or after those few bits in which the base stores them: exactly what
    /// QLoRA trained on.
    Dequantized {
        /// The code.
        quant_type: QuantType,
        /// Are block scales quantised too?
        double_quant: bool,
    },
}

/// A base as training held it: in few bits or not, and with the adapters that were merged into it before. It is what an adapter
/// was trained on.
pub struct Held<'a> {
    base: &'a dyn Source,
    into: Into,
    before: Vec<Merger>,
    separate_head: bool,
    /// Linears that a base in few bits holds as floats: training used them as they are.
    floats: BTreeSet<String>,
}

impl<'a> Held<'a> {
    /// `base` with the adapters of `before` in it, one after the other: the result of each is rounded as training rounded it, to the
    /// base's type or to its few bits.
    ///
    /// # Errors
    /// [`Into::Original`] of a base in few bits: there is nothing left of the original.
    pub fn new(base: &'a dyn Source, into: Into, before: Vec<Merger>) -> Result<Self> {
        let tensors = base.config().tensors();
        let linears = || {
            tensors
                .iter()
                .map(|(name, _)| name)
                .filter(|name| is_quantized_linear(name))
        };
        let mut floats = BTreeSet::new();
        if matches!(base.config().linears(), Linears::FourBit { .. }) {
            for name in linears() {
                if let Stored::Dense(_) = base.weight(name)? {
                    floats.insert(name.clone());
                }
            }
        }
        let held = Self {
            separate_head: base.separate_head()?,
            base,
            into,
            before,
            floats,
        };
        if let (Into::Original, Some(name)) = (into, linears().find(|name| !held.floats.contains(*name))) {
            held.in_few_bits(name)?;
        }
        Ok(held)
    }

    /// The weight of the base that `name` comes from: a tied head has none of its own.
    fn origin<'b>(&self, name: &'b str) -> &'b str {
        match name {
            LM_HEAD if !self.separate_head => WORD_EMBEDDINGS,
            name => name,
        }
    }

    fn shape(&self, name: &str) -> Result<Shape> {
        let mut tensors = self.base.config().tensors().into_iter();
        let found = tensors.find(|(tensor, _)| tensor == name);
        found.map(|(_, shape)| shape).ok_or_else(|| {
            let remedy = "this is a bug: please report it";
            Error::input(name, "no weight of this model", "one of its weights", remedy)
        })
    }

    /// Was the weight held in few bits?
    fn is_in_few_bits(&self, name: &str) -> bool {
        is_quantized_linear(name) && self.into != Into::Original && !self.floats.contains(name)
    }

    fn changes(&self, name: &str) -> bool {
        self.before.iter().any(|merger| merger.changes(name))
    }

    /// The weight in the few bits in which training held it, before anything was merged; nothing of one that it held as floats.
    fn in_few_bits(&self, name: &str) -> Result<Option<Stored>> {
        let stored = match is_quantized_linear(name) {
            true => self.base.weight(name)?,
            false => return Ok(None),
        };
        match (stored, self.into) {
            (Stored::Dense(_), Into::Original) => Ok(None),
            (
                Stored::Dense(tensor),
                Into::Dequantized {
                    quant_type,
                    double_quant,
                },
            ) => {
                let place = self.base.place(name);
                let weight = QuantTensor::quantize_named(&place, &tensor, quant_type, double_quant)?;
                Ok(Some(Stored::Quant(weight)))
            }
            (Stored::Quant(_) | Stored::Int8(_), Into::Original) => Err(Error::input(
                self.base.place(name),
                "a weight in few bits",
                "the original one for --into original",
                "give --model the fp16 folder, or use --into dequantized",
            )),
            (few, Into::Dequantized { .. }) => Ok(Some(few)),
        }
    }

    /// Rows of a weight that was held as floats: from a multiple of [`Merger::ROWS`] on, not more than that, and in the base's type.
    fn cut(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let (first, origin) = (rows.start, self.origin(name));
        let mut piece = self.base.rows(origin, rows)?;
        let dtype = self.base.dtype(origin)?;
        for merger in self.before.iter().filter(|merger| merger.changes(name)) {
            piece = merger
                .merge_rows(name, first, piece.to_dtype(DType::F32))?
                .to_dtype(dtype);
            refuse_beyond(&self.base.place(origin), &[merger], &piece)?;
        }
        Ok(piece)
    }
}

impl Source for Held<'_> {
    fn config(&self) -> &ModelConfig {
        self.base.config()
    }

    fn separate_head(&self) -> Result<bool> {
        Ok(self.separate_head || self.before.iter().any(Merger::parts_head))
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        self.base.dtype(self.origin(name))
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        if self.is_in_few_bits(name)
            && let Some(mut few) = self.in_few_bits(name)?
        {
            for merger in self.before.iter().filter(|merger| merger.changes(name)) {
                let changed = merger.merge(name, few.decoded())?;
                few = as_before(&self.base.place(name), &few, &changed)?;
            }
            return Ok(few);
        }
        match self.changes(name) {
            true => self
                .rows(name, 0..self.shape(name)?.extents()[0])
                .map(Stored::Dense),
            false => self.base.weight(self.origin(name)),
        }
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        if self.is_in_few_bits(name) {
            return Ok(self.weight(name)?.decoded().rows(rows));
        }
        match self.changes(name) {
            true => in_cuts(self.shape(name)?, self.dtype(name)?, rows, |cut| {
                self.cut(name, cut)
            }),
            false => self.base.rows(self.origin(name), rows),
        }
    }

    fn will_be_read(&self, name: &str, rows: Range<usize>) {
        let rows = match self.is_in_few_bits(name) {
            false => rows,
            // Quantised as a whole, when the first rows are asked for.
            true if rows.start == 0 => match self.shape(name) {
                Ok(shape) => 0..shape.extents()[0],
                Err(_) => return,
            },
            true => return,
        };
        self.base.will_be_read(self.origin(name), rows);
    }

    fn place(&self, name: &str) -> String {
        self.base.place(self.origin(name))
    }
}

/// A base with adapters in it. A weight is made when it is asked for, and made again when it is asked for again.
pub struct Merged<'a> {
    held: &'a Held<'a>,
    merger: &'a Merger,
    dtype: Option<DType>,
    /// The weight in few bits that was decoded last: its rows are asked for one after the other.
    at_hand: Mutex<Option<(String, Arc<Tensor>)>>,
}

impl<'a> Merged<'a> {
    /// `held` with the adapters of `merger`; with `dtype` every weight is of that type, without of the base's.
    pub fn new(held: &'a Held<'a>, merger: &'a Merger, dtype: Option<DType>) -> Self {
        Self {
            held,
            merger,
            dtype,
            at_hand: Mutex::new(None),
        }
    }

    /// What training held in few bits, decoded.
    fn decoded(&self, name: &str) -> Result<Option<Arc<Tensor>>> {
        if !self.held.is_in_few_bits(name) {
            return Ok(None);
        }
        let at_hand = || self.at_hand.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *at_hand() {
            Some((held, tensor)) if held == name => return Ok(Some(Arc::clone(tensor))),
            // Two of them are not in memory at once.
            other => *other = None,
        }
        // The lock is not held meanwhile: a thread that quantises takes up work of others, which may ask for this too.
        let decoded = Arc::new(self.held.weight(name)?.decoded());
        *at_hand() = Some((name.to_string(), Arc::clone(&decoded)));
        Ok(Some(decoded))
    }

    /// The rows `rows` of the result, of a weight that is not the base's as it is stored.
    fn made(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let (dtype, decoded) = (self.dtype(name)?, self.decoded(name)?);
        in_cuts(self.held.shape(name)?, dtype, rows, |cut| {
            let first = cut.start;
            let held = match &decoded {
                Some(whole) => whole.rows(cut),
                None => self.held.cut(name, cut)?.to_dtype(DType::F32),
            };
            let made = self.merger.merge_rows(name, first, held)?.to_dtype(dtype);
            refuse_beyond(&self.place(name), &[self.merger], &made)?;
            Ok(made)
        })
    }

    /// Is the weight the one that was held, to the bit and in the same form?
    fn is_held(&self, name: &str) -> Result<bool> {
        let same_type = match self.dtype {
            Some(dtype) => dtype == self.held.dtype(name)?,
            None => true,
        };
        Ok(same_type && !self.held.is_in_few_bits(name) && !self.merger.changes(name))
    }
}

impl Source for Merged<'_> {
    fn config(&self) -> &ModelConfig {
        self.held.config()
    }

    fn separate_head(&self) -> Result<bool> {
        Ok(self.held.separate_head()? || self.merger.parts_head())
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        match self.dtype {
            Some(dtype) => Ok(dtype),
            None => self.held.dtype(name),
        }
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        match self.is_held(name)? {
            true => self.held.weight(name),
            false => {
                let rows = self.held.shape(name)?.extents()[0];
                self.made(name, 0..rows).map(Stored::Dense)
            }
        }
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        match self.is_held(name)? {
            true => self.held.rows(name, rows),
            false => self.made(name, rows),
        }
    }

    fn will_be_read(&self, name: &str, rows: Range<usize>) {
        self.held.will_be_read(name, rows);
    }

    fn place(&self, name: &str) -> String {
        self.held.place(name)
    }
}

/// Rows of a weight of the shape `whole`, made of cuts at multiples of [`Merger::ROWS`], wherever the rows begin: so their bits do
/// not depend on who asks for which.
fn in_cuts(
    whole: Shape,
    dtype: DType,
    rows: Range<usize>,
    make: impl Fn(Range<usize>) -> Result<Tensor> + Sync,
) -> Result<Tensor> {
    let first = rows.start - rows.start % Merger::ROWS;
    let mut extents = whole.extents().to_vec();
    // The last cut is whole too where the weight goes on.
    let end = rows.end.next_multiple_of(Merger::ROWS).min(extents[0]);
    extents[0] = end - first;
    let mut out = Tensor::zeros(dtype, Shape::new(&extents));
    let row = out.byte_len() / extents[0].max(1);
    out.bytes_mut()
        .par_chunks_mut((Merger::ROWS * row).max(1))
        .enumerate()
        .try_for_each(|(i, bytes)| {
            let start = first + i * Merger::ROWS;
            let made = make(start..end.min(start + Merger::ROWS))?;
            bytes.copy_from_slice(made.bytes());
            Ok::<_, Error>(())
        })?;
    Ok(match first == rows.start && end == rows.end {
        true => out,
        false => out.rows(rows.start - first..rows.end - first),
    })
}

/// A number that the type cannot hold.
fn refuse_beyond(place: &str, mergers: &[&Merger], made: &Tensor) -> Result<()> {
    refuse_non_finite(place, made).map_err(|_| {
        // NaN stays one in every type.
        let is_nan = made.to_f64_vec().iter().any(|x| x.is_nan());
        let adapters: Vec<String> = mergers
            .iter()
            .flat_map(|merger| merger.adapters())
            .map(|(dir, _)| format!(" with {}", dir.display()))
            .collect();
        let found = match is_nan {
            true => "NaN".to_string(),
            false => format!("a number that {} cannot hold", made.dtype()),
        };
        let remedy = match is_nan {
            true => "check the numbers of the adapter and the base with `glmtune inspect`",
            false => "check the numbers of the adapter and the base; `glmtune merge --type bf16` and fp32 hold larger ones",
        };
        Error::input(
            format!("{place}{}", adapters.concat()),
            found,
            "finite weights",
            remedy,
        )
    })
}

/// `new` (F32) in the few bits of `old`, quantised from the type that it was once quantised from: as merging in memory does.
fn as_before(place: &str, old: &Stored, new: &Tensor) -> Result<Stored> {
    match old {
        Stored::Quant(old) => {
            let source = new.to_dtype(old.source_dtype);
            let double_quant = matches!(old.absmax, Absmax::Nested { .. });
            QuantTensor::quantize_named(place, &source, old.quant_type, double_quant).map(Stored::Quant)
        }
        Stored::Int8(_) => RowInt8::quantize(place, new).map(Stored::Int8),
        Stored::Dense(old) => Ok(Stored::Dense(new.to_dtype(old.dtype()))),
    }
}
