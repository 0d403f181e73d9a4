//! 4-bit weights: on their way to a device and back, quantised there, decoded there.

use std::ops::Range;
use std::ptr;

use half::{bf16, f16};

use super::gemm::ordinal;
use super::sys::{
    Nf4Dequantize, Nf4Mean, Nf4Pack, Nf4PackAbsmax, Nf4Planes, Nf4Quantize, Nf4QuantizeAbsmax, Nf4Weight,
};
use super::{Grid, blocks, launch, launch_named, size};
use crate::error::{Error, Result};
use crate::quant::{self, Absmax, BLOCK, NESTED_BLOCK, Order, QuantTensor, QuantType};
use crate::tensor::{DType, Device, Shape, Tensor};

/// Outputs of a group, to whose multiples rows are padded.
const GROUP: usize = 32;
/// Scales of one output that lie beside each other.
const QUAD: usize = 4;
/// Threads of a block of every kernel here but `nf4_absmax_mean`.
const THREADS: usize = 256;
/// f16 scales are multiplied by this, and sums divided: scales from 5e-7 (instead of 6e-5) keep all their digits, and those
/// up to 511 stay finite.
const GAIN: f32 = 128.0;

/// How a code book is used on a device.
///
/// Codes are renumbered so that numbers p and p + 8 agree in the top bits of both their bytes, in f16 and in bf16
/// (`cuda/nf4.cuh` says what for). Where there are fewer negative values than others, the code `negative_zero` stands for -0.
///
/// A table is stretched before it is rounded to 16 bits, and scales shrunk. The factors were searched: among those that
/// allow such pairs, the ones with which rounding the table costs least. Error relative to Gaussian weights: NF4 in f16
/// 0.8e-4 (1.8e-4 unstretched), in bf16 0.9e-3 (1.4e-3); FP4 in either 0 (1.6e-4, 1.3e-3).
struct Book {
    /// By code.
    numbers: [u8; 16],
    negative_zero: Option<u8>,
    stretch_f16: f32,
    stretch_bf16: f32,
}

const NF4: Book = Book {
    numbers: [0, 1, 2, 10, 9, 8, 3, 11, 4, 5, 6, 7, 13, 15, 14, 12],
    negative_zero: Some(7),
    stretch_f16: 1.8868,
    stretch_bf16: 1.5246,
};

const FP4: Book = Book {
    numbers: [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15],
    negative_zero: Some(8),
    stretch_f16: 1.5,
    stretch_bf16: 1.5,
};

/// Whole numbers are exact in both types; in bf16, where a byte's top bit is the last of the exponent, times 1, 2 or 4 they do not
/// fall into pairs, times 5 / 4 they do.
const INT4: Book = Book {
    numbers: [0, 2, 8, 1, 10, 3, 11, 9, 13, 5, 15, 7, 14, 12, 4, 6],
    negative_zero: None,
    stretch_f16: 1.0,
    stretch_bf16: 1.25,
};

impl Book {
    fn of(quant_type: QuantType) -> &'static Book {
        match quant_type {
            QuantType::Nf4 => &NF4,
            QuantType::Fp4 => &FP4,
            QuantType::Int4 => &INT4,
        }
    }

    fn stretch(&self, dtype: DType) -> f32 {
        match dtype {
            DType::F16 => self.stretch_f16,
            DType::BF16 => self.stretch_bf16,
            _ => 1.0,
        }
    }

    /// Nibble c is the number of code c.
    fn numbers(&self) -> u64 {
        (0..16).fold(0, |word, c| word | u64::from(self.numbers[c]) << (4 * c))
    }

    /// Nibble p is the code of number p.
    fn codes(&self) -> u64 {
        (0..16).fold(0, |word, c| word | (c as u64) << (4 * self.numbers[c]))
    }
}

/// The table by number, times the stretch of `dtype`; and that stretch.
pub(super) fn values(quant_type: QuantType, dtype: DType) -> ([f32; 16], f32) {
    let book = Book::of(quant_type);
    let stretch = book.stretch(dtype);
    let mut values = [0.0; 16];
    for (number, value) in book.numbers.iter().zip(quant_type.table()) {
        values[usize::from(*number)] = value * stretch;
    }
    (values, stretch)
}

/// The table as planes of bytes, for kernels that compute in f16 or bf16.
pub(super) fn planes(quant_type: QuantType, dtype: DType) -> Nf4Planes {
    let book = Book::of(quant_type);
    let (values, stretch) = values(quant_type, dtype);
    let mut bits = values.map(|value| match dtype {
        DType::F16 => f16::from_f32(value).to_bits(),
        _ => bf16::from_f32(value).to_bits(),
    });
    if let Some(code) = book.negative_zero {
        bits[usize::from(book.numbers[usize::from(code)])] = 0x8000;
    }
    let plane = |byte: usize| {
        let entry = |p: usize| bits[p].to_le_bytes()[byte];
        // Where the lower half's byte has its top bit, the upper half's look-up meets FF: see nf4_decode_4.
        let table: [u8; 16] = std::array::from_fn(|p| match p {
            0..8 => entry(p),
            _ if entry(p - 8) & 0x80 != 0 => entry(p) ^ 0xff,
            _ => entry(p),
        });
        std::array::from_fn(|word| u32::from_le_bytes(std::array::from_fn(|i| table[4 * word + i])))
    };
    let gain = if dtype == DType::F16 { GAIN } else { 1.0 };
    Nf4Planes {
        low: plane(0),
        high: plane(1),
        pre: gain / stretch,
        post: 1.0 / gain,
    }
}

/// A size as the kernels of 4-bit weights take it.
pub(super) fn extent(operation: &'static str, extent: usize) -> Result<u32> {
    size(operation, extent).map(|extent| extent as u32)
}

/// `weight`, which lies on a device, as its kernels take it.
pub(super) fn weight(operation: &'static str, weight: &QuantTensor) -> Result<Nf4Weight> {
    let (outputs, inputs) = weight.shape.rows_and_columns();
    let none = Nf4Weight {
        codes: weight.codes.device_ptr().cast(),
        absmax_codes: ptr::null(),
        absmax: ptr::null(),
        map: ptr::null(),
        offset: 0.0,
        first: 0,
        outputs: extent(operation, outputs)?,
        inputs: extent(operation, inputs)?,
    };
    Ok(match &weight.absmax {
        Absmax::Flat(absmax) => Nf4Weight {
            absmax: absmax.device_ptr().cast(),
            ..none
        },
        Absmax::Nested {
            codes,
            nested_absmax,
            offset,
            code,
        } => Nf4Weight {
            absmax_codes: codes.device_ptr().cast(),
            absmax: nested_absmax.device_ptr().cast(),
            map: code.device_ptr().cast(),
            offset: *offset,
            ..none
        },
    })
}

fn grid(blocks: u32, shared_bytes: u32) -> Grid {
    Grid {
        blocks: [blocks, 1, 1],
        threads: THREADS as u32,
        shared_bytes,
    }
}

/// `[N, K]` of a weight that kernels can take.
fn extents(operation: &'static str, shape: Shape) -> Result<(usize, usize)> {
    let (n, k) = shape.rows_and_columns();
    // Indices of blocks of 64 are 32 bits wide.
    if n > 0 && k > 0 && k.is_multiple_of(BLOCK) && n.next_multiple_of(GROUP) * (k / BLOCK) < 1 << 31 {
        return Ok((n, k));
    }
    Err(Error::Shape {
        operation,
        found: format!("a 4-bit weight {shape} on a CUDA device"),
        expected: format!("a multiple of {BLOCK} inputs, and fewer than 2^37 weights"),
    })
}

/// Bytes of packed codes, number of packed scales.
fn packed_sizes(n: usize, k: usize) -> (usize, usize) {
    let groups = n.div_ceil(GROUP);
    (
        groups * GROUP * k / 2,
        groups * k.div_ceil(BLOCK * QUAD) * GROUP * QUAD,
    )
}

/// Which way `repack` goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Pack,
    Unpack,
}

impl Direction {
    /// In which order a weight ends.
    fn order(self) -> Order {
        match self {
            Direction::Pack => Order::Groups,
            Direction::Unpack => Order::Rows,
        }
    }
}

/// Copies codes and scales of a weight that lies on device `card` between the two orders; the new weight lies there too.
fn repack(
    operation: &'static str,
    from: &QuantTensor,
    card: u8,
    direction: Direction,
) -> Result<QuantTensor> {
    let (n, k) = extents(operation, from.shape)?;
    let book = Book::of(from.quant_type);
    let packing = direction == Direction::Pack;
    let (bytes, scales) = if packing {
        packed_sizes(n, k)
    } else {
        (n * k / 2, n * (k / BLOCK))
    };
    let (outputs, inputs) = (extent(operation, n)?, extent(operation, k)?);
    let (_, packed_scales) = packed_sizes(n, k);

    let mut codes = Tensor::zeros_on(Device::Cuda(card), DType::U8, [bytes])?;
    if codes.is_planned() {
        return planned(from, codes, scales, direction);
    }
    let (to, source) = (codes.device_ptr_mut(), from.codes.device_ptr().cast_mut());
    let (packed, plain) = if packing { (to, source) } else { (source, to) };
    let zero = from.table().iter().position(|&value| value == 0.0).unwrap_or(0);
    let params = Nf4Pack {
        packed: packed.cast(),
        plain: plain.cast(),
        numbers: if packing { book.numbers() } else { book.codes() },
        outputs,
        inputs,
        zero: zero as u32,
        reserved: 0,
    };
    let chunks = n.next_multiple_of(GROUP) / 4 * (k / 8);
    let kernel = if packing { "nf4_pack" } else { "nf4_unpack" };
    let all = grid(blocks(operation, chunks, THREADS)?, 0);
    // SAFETY: `extents` has checked the shape; codes in bitsandbytes' order are n k / 2 bytes (QuantTensor's invariant),
    // packed ones as many as packed_sizes says, on this device.
    unsafe { launch_named(card, operation, kernel, all, &params)? };

    let reorder = |from: &Tensor, name: &str| -> Result<Tensor> {
        let mut to = Tensor::zeros_on(Device::Cuda(card), from.dtype(), [scales])?;
        let (target, source) = (to.device_ptr_mut(), from.device_ptr().cast_mut());
        let (packed, plain) = if packing {
            (target, source)
        } else {
            (source, target)
        };
        let params = Nf4PackAbsmax {
            packed,
            plain,
            outputs,
            inputs,
        };
        let kernel = format!("{kernel}_absmax_{name}");
        let all = grid(blocks(operation, packed_scales, THREADS)?, 0);
        // SAFETY: as above, for n k / 64 scales.
        unsafe { launch_named(card, operation, &kernel, all, &params)? };
        Ok(to)
    };
    let name = match &from.absmax {
        Absmax::Flat(_) => "flat",
        Absmax::Nested { .. } => "nested",
    };
    let absmax = from.absmax.map_blocks(|scales| reorder(scales, name))?;
    Ok(QuantTensor {
        codes,
        absmax,
        order: direction.order(),
        ..from.clone()
    })
}

/// What [`repack`] makes in a plan: the same tensors without contents.
fn planned(from: &QuantTensor, codes: Tensor, scales: usize, direction: Direction) -> Result<QuantTensor> {
    let reorder = |from: &Tensor| Tensor::zeros_on(codes.device(), from.dtype(), [scales]);
    let absmax = from.absmax.map_blocks(reorder)?;
    Ok(QuantTensor {
        codes,
        absmax,
        order: direction.order(),
        ..from.clone()
    })
}

/// Every tensor of `weight` on `device`, in its order.
fn transfer(weight: &QuantTensor, device: Device) -> Result<QuantTensor> {
    let absmax = match &weight.absmax {
        Absmax::Flat(absmax) => Absmax::Flat(absmax.to_device(device)?),
        Absmax::Nested {
            codes,
            nested_absmax,
            offset,
            code,
        } => Absmax::Nested {
            codes: codes.to_device(device)?,
            nested_absmax: nested_absmax.to_device(device)?,
            offset: *offset,
            code: code.to_device(device)?,
        },
    };
    Ok(QuantTensor {
        codes: weight.codes.to_device(device)?,
        absmax,
        ..weight.clone()
    })
}

/// A weight of the host on device `card`, in the order that kernels read (`cuda/nf4.cuh`).
///
/// # Errors
/// The shape is none that kernels take, or the device has no room.
pub(crate) fn place(weight: &QuantTensor, card: u8) -> Result<QuantTensor> {
    const OPERATION: &str = "place_quantized";
    extents(OPERATION, weight.shape)?;
    let plain = transfer(weight, Device::Cuda(card))?;
    repack(OPERATION, &plain, card, Direction::Pack)
}

/// A weight of a device on the host, in bitsandbytes' order.
///
/// # Errors
/// A copy fails, or the device has no room for the second order.
pub(crate) fn fetch(weight: &QuantTensor) -> Result<QuantTensor> {
    const OPERATION: &str = "place_quantized";
    let card = ordinal(OPERATION, &weight.codes)?;
    transfer(&repack(OPERATION, weight, card, Direction::Unpack)?, Device::Cpu)
}

/// Quantises `source`, which lies on a device, there; `None` when a weight, or a scale of scales, is not finite, and for a code that
/// has no scales of blocks.
///
/// # Errors
/// The shape is none that kernels take, or the device has no room.
pub(crate) fn quantize(
    source: &Tensor,
    quant_type: QuantType,
    double_quant: bool,
) -> Result<Option<QuantTensor>> {
    const OPERATION: &str = "quantize";
    let Some(ranks) = quant_type.ranks() else {
        return Ok(None);
    };
    let card = ordinal(OPERATION, source)?;
    let device = source.device();
    let (n, k) = extents(OPERATION, source.shape())?;
    let scales = n * (k / BLOCK);
    let mut codes = Tensor::zeros_on(device, DType::U8, [n * k / 2])?;
    let mut flat = Tensor::zeros_on(device, DType::F32, [scales])?;
    let mut bad = Tensor::zeros_on(device, DType::I32, [1])?;
    if codes.is_planned() {
        let plain = QuantTensor::planned(source, quant_type, double_quant, codes, flat)?;
        return repack(OPERATION, &plain, card, Direction::Pack).map(Some);
    }
    let params = Nf4Quantize {
        codes: codes.device_ptr_mut().cast(),
        absmax: flat.device_ptr_mut().cast(),
        bad: bad.device_ptr_mut().cast(),
        source: source.device_ptr(),
        n: (n * k) as u64,
        order: (0..16).fold(0, |word, r| word | u64::from(ranks.order[r]) << (4 * r)),
        midpoints: ranks.midpoints,
        reserved: 0,
    };
    let all = grid(blocks(OPERATION, scales, THREADS / 8)?, 0);
    // SAFETY: the outputs have the sizes that the kernel writes for n k elements, a multiple of 64; all on this device.
    unsafe { launch(card, "nf4_quantize", source.dtype(), all, &params)? };
    if bad.to_device(Device::Cpu)?.as_slice::<i32>()[0] != 0 {
        return Ok(None);
    }
    let absmax = if double_quant {
        match quantize_absmax(OPERATION, card, &flat)? {
            Some(absmax) => absmax,
            None => return Ok(None),
        }
    } else {
        Absmax::Flat(flat)
    };
    let plain = QuantTensor {
        quant_type,
        codes,
        absmax,
        order: Order::Rows,
        shape: source.shape(),
        source_dtype: source.dtype(),
    };
    repack(OPERATION, &plain, card, Direction::Pack).map(Some)
}

/// Double quantisation of `flat` scales; `None` when their mean overflows.
fn quantize_absmax(operation: &'static str, card: u8, flat: &Tensor) -> Result<Option<Absmax>> {
    let (device, n) = (flat.device(), flat.elements());
    let mut mean = Tensor::zeros_on(device, DType::F32, [1])?;
    let params = Nf4Mean {
        offset: mean.device_ptr_mut().cast(),
        absmax: flat.device_ptr().cast(),
        n: n as u64,
    };
    let one = Grid {
        blocks: [1, 1, 1],
        threads: 1024,
        shared_bytes: (32 + 1) * 32 * 4,
    };
    // SAFETY: flat has n numbers, mean one.
    unsafe { launch_named(card, operation, "nf4_absmax_mean", one, &params)? };

    let code = Tensor::from_slice(&quant::nested_map()[..], [256]).to_device(device)?;
    let mut codes = Tensor::zeros_on(device, DType::U8, [n])?;
    let mut nested_absmax = Tensor::zeros_on(device, DType::F32, [n.div_ceil(NESTED_BLOCK)])?;
    let params = Nf4QuantizeAbsmax {
        codes: codes.device_ptr_mut().cast(),
        nested: nested_absmax.device_ptr_mut().cast(),
        absmax: flat.device_ptr().cast(),
        offset: mean.device_ptr().cast(),
        map: code.device_ptr().cast(),
        n: n as u64,
    };
    let all = grid(blocks(operation, n, NESTED_BLOCK)?, (256 + 32) * 4);
    // SAFETY: flat and codes have n elements, nested_absmax one for each 256, the map 256, mean one.
    unsafe { launch_named(card, operation, "nf4_absmax_codes", all, &params)? };
    let offset = mean.to_device(Device::Cpu)?.as_slice::<f32>()[0];
    let scales = nested_absmax.to_device(Device::Cpu)?;
    let finite = scales.as_slice::<f32>().iter().all(|scale| scale.is_finite());
    if !offset.is_finite() || !finite {
        return Ok(None);
    }
    Ok(Some(Absmax::Nested {
        codes,
        nested_absmax,
        offset,
        code,
    }))
}

/// `out [rows, K]`: these rows of w, rounded once to out's type.
///
/// # Errors
/// The first row is none that a group begins with, or the driver refuses.
pub(crate) fn dequantize(w: &QuantTensor, rows: Range<usize>, out: &mut Tensor) -> Result<()> {
    const OPERATION: &str = "dequantize";
    if !rows.start.is_multiple_of(GROUP) {
        return Err(Error::Shape {
            operation: OPERATION,
            found: format!("rows from {}", rows.start),
            expected: format!("rows from a multiple of {GROUP} on"),
        });
    }
    let (n, k) = (rows.len(), w.shape.rows_and_columns().1);
    let params = Nf4Dequantize {
        out: out.device_ptr_mut(),
        w: Nf4Weight {
            first: extent(OPERATION, rows.start)?,
            outputs: extent(OPERATION, n)?,
            ..weight(OPERATION, w)?
        },
        values: values(w.quant_type, DType::F32).0,
    };
    let all = Grid {
        // A block takes 1024 inputs of a group.
        blocks: [blocks(OPERATION, k, 1024)?, blocks(OPERATION, n, GROUP)?, 1],
        threads: THREADS as u32,
        shared_bytes: (256 + 16) * 4,
    };
    // SAFETY: ops::dequantize has checked that w has the rows, and that out has room for them and lies where w does; w was
    // placed there by `place`.
    unsafe {
        launch(
            ordinal(OPERATION, out)?,
            "nf4_dequantize",
            out.dtype(),
            all,
            &params,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What nf4_decode_4 computes.
    fn decoded(plane: [u32; 4], number: usize) -> u8 {
        let table: Vec<u8> = plane.iter().flat_map(|word| word.to_le_bytes()).collect();
        let sign = |byte: u8| if byte & 0x80 != 0 { 0xff } else { 0 };
        let (lower, upper) = (table[number % 8], table[8 + number % 8]);
        if number < 8 {
            lower ^ sign(upper)
        } else {
            sign(lower) ^ upper
        }
    }

    #[test]
    fn planes_decode_to_the_stretched_table() {
        for quant_type in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4] {
            for dtype in [DType::F16, DType::BF16] {
                let planes = planes(quant_type, dtype);
                let (values, stretch) = values(quant_type, dtype);
                for (number, value) in values.into_iter().enumerate() {
                    let bits =
                        u16::from_le_bytes([decoded(planes.low, number), decoded(planes.high, number)]);
                    let (got, want) = if dtype == DType::F16 {
                        (f16::from_bits(bits).to_f32(), f16::from_f32(value).to_f32())
                    } else {
                        (bf16::from_bits(bits).to_f32(), bf16::from_f32(value).to_f32())
                    };
                    assert_eq!(got, want, "{quant_type} {dtype} number {number}");
                }
                let all = stretch * planes.pre * planes.post;
                assert!((all - 1.0).abs() < 1e-6, "{quant_type} {dtype}: {all}");
            }
        }
    }

    #[test]
    fn numbers_are_a_permutation_and_codes_its_inverse() {
        for book in [NF4, FP4, INT4] {
            for code in 0..16 {
                let number = book.numbers() >> (4 * code) & 15;
                assert_eq!(book.codes() >> (4 * number) & 15, code);
            }
        }
    }
}
