//! DoRA (Liu et al. 2024): the adapted weight's rows keep their directions, their lengths train apart.
//!
//! `W' = g ⊙ (W + s B A)` row by row, with `g_i = m_i / n_i` and `n_i = |w_i + s Σ_j b_ij a_j|`. As in PEFT the norm n is
//! a constant to the gradient (section 4.3 of the paper).
//!
//! W + s B A is never made: `n_i² = |w_i|² + Σ_j b_ij (2 s p_ji + s² q_ij)` with `p = A Wᵀ`, a product of r rows, and
//! `q = B (A Aᵀ)`; `|w_i|²` is computed once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Linear, Lora, Param};
use crate::error::Result;
use crate::ops::{self, WeightRef};
use crate::tensor::{Compute, Tensor};

/// What DoRA adds to an adapter.
#[derive(Debug)]
pub struct Dora {
    /// m `[out]`.
    magnitude: Param,
    /// `|w_i|²` `[out]`.
    squares: Tensor,
    gain: Mutex<Gain>,
}

/// g and 1 / n of the present parameters, `[out]` each, made by the first pass after they may have changed: an evaluation
/// and every token of an answer find them made.
#[derive(Debug)]
struct Gain {
    current: bool,
    gain: Tensor,
    inverse: Tensor,
}

/// Buffers to make gains with, for one layer after the other.
#[derive(Debug)]
pub struct DoraScratch {
    /// A in the compute type `[r, in]`; empty where that is the type of sums.
    a: Tensor,
    /// p `[r, out]`.
    p: Tensor,
    /// A Aᵀ `[r, r]`.
    gram: Tensor,
    /// q `[out, r]`.
    q: Tensor,
    /// `g ⊙ dy`, or `(g - 1) ⊙ dy`, `[rows, out]`.
    pub(super) dz: Tensor,
}

impl DoraScratch {
    /// For those of `linears` that carry DoRA, over up to `rows` rows.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new<'a>(compute: Compute, rows: usize, linears: impl Iterator<Item = &'a Linear>) -> Result<Self> {
        let [mut a, mut p, mut gram, mut dz] = [0; 4];
        for linear in linears {
            let Some(lora) = linear.lora.as_ref().filter(|lora| lora.dora.is_some()) else {
                continue;
            };
            let ((out, input), r) = (linear.extents(), lora.rank());
            if compute.dtype != compute.dtype.accumulator() {
                a = a.max(r * input);
            }
            (p, gram, dz) = (p.max(r * out), gram.max(r * r), dz.max(rows * out));
        }
        Ok(Self {
            a: compute.zeros([a])?,
            p: compute.accumulators([p])?,
            gram: compute.accumulators([gram])?,
            q: compute.accumulators([p])?,
            dz: compute.zeros([dz])?,
        })
    }

    /// The buffer of `rows` gradients over z.
    pub(super) fn dz_rows(&mut self, rows: usize, out: usize) -> Result<&mut Tensor> {
        self.dz.resize([rows, out])?;
        Ok(&mut self.dz)
    }
}

impl Dora {
    /// For a weight, with the magnitude `magnitude`.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(weight: WeightRef<'_>, magnitude: Param) -> Result<Self> {
        let like = &magnitude.value;
        let zeros = || Tensor::zeros_on(like.device(), like.dtype(), like.shape());
        let mut squares = zeros()?;
        if !squares.is_planned() {
            ops::row_squares(weight, &mut squares)?;
        }
        let gain = Gain {
            current: false,
            gain: zeros()?,
            inverse: zeros()?,
        };
        Ok(Self {
            magnitude,
            squares,
            gain: Mutex::new(gain),
        })
    }

    /// m `[out]`.
    pub fn magnitude(&self) -> &Param {
        &self.magnitude
    }

    /// m `[out]`, to change it; what was computed with it is forgotten.
    pub fn magnitude_mut(&mut self) -> &mut Param {
        self.forget();
        &mut self.magnitude
    }

    /// The gradient over m; unlike [`Dora::magnitude_mut`] this leaves the gain as it is.
    pub(super) fn gradient_mut(&mut self) -> (&mut Option<Tensor>, &Tensor) {
        let gain = self.gain.get_mut().unwrap_or_else(PoisonError::into_inner);
        (&mut self.magnitude.grad, &gain.inverse)
    }

    /// Parameters of the adapter may have changed: the gain is made anew when it is asked for.
    pub fn forget(&mut self) {
        self.gain
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .current = false;
    }

    fn gain(&self) -> MutexGuard<'_, Gain> {
        self.gain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `|w_i + s Σ_j b_ij a_j|` `[out]` on the host, in f64: what magnitudes start as.
    pub(crate) fn norms(inverse: &Tensor) -> Vec<f64> {
        inverse.to_f64_vec().into_iter().map(|x| 1.0 / x).collect()
    }
}

impl Lora {
    /// Calls `f` with the present g `[out]`, made by now if it was not. Does nothing without DoRA.
    pub(super) fn with_gain<R>(
        &self,
        weight: WeightRef<'_>,
        scratch: &mut DoraScratch,
        f: impl FnOnce(&Tensor, &mut DoraScratch) -> Result<R>,
    ) -> Result<Option<R>> {
        let Some(dora) = &self.dora else {
            return Ok(None);
        };
        let mut gain = dora.gain();
        if !gain.current {
            self.make_gain(dora, weight, scratch, &mut gain)?;
        }
        f(&gain.gain, scratch).map(Some)
    }

    fn make_gain(
        &self,
        dora: &Dora,
        weight: WeightRef<'_>,
        scratch: &mut DoraScratch,
        gain: &mut Gain,
    ) -> Result<()> {
        let (out, input) = weight.extents();
        let (a, b, r) = (&self.a.value, &self.b.value, self.rank());
        let DoraScratch {
            a: narrow,
            p,
            gram,
            q,
            ..
        } = scratch;
        p.resize([r, out])?;
        gram.resize([r, r])?;
        q.resize([out, r])?;
        // Products with W read the compute type.
        let rounded = if narrow.dtype() == a.dtype() {
            a
        } else {
            narrow.resize([r, input])?;
            ops::cast(a, narrow)?;
            &*narrow
        };
        ops::linear(rounded, weight, None, None, p)?;
        ops::matmul(1.0, (a, false), (a, true), 0.0, gram)?;
        ops::matmul(1.0, (b, false), (gram, false), 0.0, q)?;
        let into = (&mut gain.gain, &mut gain.inverse);
        ops::dora_gain(&dora.magnitude.value, &dora.squares, b, (p, q), self.scale, into)?;
        gain.current = true;
        Ok(())
    }
}

impl Linear {
    /// Turns the layer's adapter into one of DoRA: `m_i = |w_i + s Σ_j b_ij a_j|`, so that the layer computes what it did.
    ///
    /// # Errors
    /// The device has no room.
    pub fn start_dora(&mut self) -> Result<()> {
        let Some(lora) = &self.lora else { return Ok(()) };
        let like = &lora.b.value;
        let (device, dtype) = (like.device(), like.dtype());
        let there = self.weight.on(device)?;
        let weight = there.as_ref().unwrap_or(&self.weight).as_ref();
        let (out, _) = weight.extents();
        let Some(lora) = &mut self.lora else { return Ok(()) };
        let ones = Tensor::from_slice(&vec![1f32; out], [out]).to_dtype(dtype);
        lora.dora = Some(Dora::new(weight, Param::frozen(ones.into_device(device)?))?);
        // In the type of sums throughout; where products with W have another one, the scratch rounds A to it.
        let compute = Compute {
            device,
            dtype: match weight {
                WeightRef::Dense(w) if device != crate::tensor::Device::Cpu => w.dtype(),
                _ => dtype,
            },
        };
        let mut scratch = DoraScratch::new(compute, 0, std::iter::once(&*self))?;
        let weight = there.as_ref().unwrap_or(&self.weight).as_ref();
        let Some(lora) = &mut self.lora else { return Ok(()) };
        let planned = lora.b.value.is_planned();
        if !planned {
            lora.with_gain(weight, &mut scratch, |_, _| Ok(()))?;
        }
        let Some(dora) = &mut lora.dora else { return Ok(()) };
        let norms = match planned {
            true => vec![1.0; out],
            false => Dora::norms(&dora.gain().inverse.to_device(crate::tensor::Device::Cpu)?),
        };
        let magnitude = Tensor::from_slice(&norms, [out])
            .to_dtype(dtype)
            .into_device(device)?;
        *dora.magnitude_mut() = if lora.a.trains() {
            Param::trainable(magnitude)?
        } else {
            Param::frozen(magnitude)
        };
        Ok(())
    }
}
