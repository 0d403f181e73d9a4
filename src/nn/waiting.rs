//! Matrices that wait in host memory and are copied to the device when a layer needs them.
//!
//! They wait as the device reads them: 4-bit codes and scales in its order, dense matrices in its type. What is small, the scales of
//! rows, the scales of scales and their map, stays on the device.

use super::{Param, Weight};
use crate::error::Result;
use crate::ops;
use crate::quant::{QuantTensor, RowInt8};
use crate::tensor::{Device, Tensor};

impl Weight {
    /// Moves the matrix, which lies on a device, to page-locked host memory beside it.
    ///
    /// # Errors
    /// The system does not lock so much memory, or a copy fails.
    pub fn into_host(self) -> Result<Self> {
        self.with_large(&|tensor| {
            let mut copy = Tensor::zeros_pinned(tensor.device(), tensor.dtype(), tensor.shape())?;
            ops::store(tensor, &mut copy)?;
            Ok(copy)
        })
    }

    /// A copy on `device` of a matrix that waits in host memory, to use it outside a pass; `None`: it is there.
    ///
    /// # Errors
    /// The device has no room, or a copy fails.
    pub fn on(&self, device: Device) -> Result<Option<Self>> {
        if self.lies_on(device) {
            return Ok(None);
        }
        self.with_large(&|tensor| tensor.to_device(device)).map(Some)
    }

    /// Can `device` read the matrix where it lies?
    pub fn lies_on(&self, device: Device) -> bool {
        self.large().device() == device
    }

    /// Does the matrix wait in host memory beside a device?
    pub fn waits(&self) -> bool {
        self.large().device() != self.beside()
    }

    /// The device that it lies on or waits for.
    pub fn beside(&self) -> Device {
        self.large().beside()
    }

    fn large(&self) -> &Tensor {
        match self.as_ref() {
            ops::WeightRef::Dense(tensor) => tensor,
            ops::WeightRef::Quant(weight) => &weight.codes,
            ops::WeightRef::Int8(weight) => &weight.codes,
        }
    }

    /// The frozen matrix whose large tensors are what `f` makes of those of this one.
    fn with_large(&self, f: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let weight = match self {
            Weight::Dense(param) => return Ok(Weight::Dense(Param::frozen(f(&param.value)?))),
            Weight::Quant(weight) => weight,
            Weight::Int8(weight) => {
                return Ok(Weight::Int8(Box::new(RowInt8 {
                    codes: f(&weight.codes)?,
                    scales: weight.scales.clone(),
                    source_dtype: weight.source_dtype,
                })));
            }
        };
        let absmax = weight.absmax.map_blocks(f)?;
        Ok(Weight::Quant(Box::new(QuantTensor {
            quant_type: weight.quant_type,
            codes: f(&weight.codes)?,
            absmax,
            order: weight.order,
            shape: weight.shape,
            source_dtype: weight.source_dtype,
        })))
    }
}
