//! Head and cross-entropy.

use glmtune::ops::{self, HEAD_CHUNK, HeadRef, HeadScratch, STATISTICS, WeightRef};
use glmtune::quant::{QuantTensor, QuantType, RowInt8};
use glmtune::tensor::{Compute, DType, Device, Tensor};

use crate::common::assert_close;
use crate::{TYPES, assert_matches, device, down, epsilon, nan, random, twice, up, wide};

const SCALE: f64 = 0.125;

/// How a head is held.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Dense,
    Int8,
    Nf4,
    Streamed,
}

/// A head on a device.
enum Held {
    Dense(Tensor),
    Int8(Box<RowInt8>),
    Nf4(Box<QuantTensor>),
    Streamed(Vec<Tensor>),
}

impl Held {
    fn as_ref(&self) -> HeadRef<'_> {
        match self {
            Held::Dense(w) => WeightRef::Dense(w).into(),
            Held::Int8(w) => WeightRef::Int8(w).into(),
            Held::Nf4(w) => WeightRef::Quant(w).into(),
            Held::Streamed(pieces) => HeadRef::Streamed(pieces),
        }
    }
}

struct Case {
    x: Tensor,
    w: Tensor,
    form: Form,
    targets: Tensor,
    /// How many logits there is room for.
    room: usize,
}

impl Case {
    fn new(dtype: DType, rows: usize, vocabulary: usize, k: usize, room: usize) -> Self {
        let targets: Vec<i32> = (0..rows).map(|r| ((r * 37 + 11) % vocabulary) as i32).collect();
        Self {
            x: random(dtype, [rows, k], 1, 1.0),
            w: random(dtype, [vocabulary, k], 2, 0.3),
            form: Form::Dense,
            targets: Tensor::from_slice(&targets, [rows]),
            room,
        }
    }

    /// What is multiplied: the matrix that the form holds, rounded to the compute type.
    fn decoded(&self) -> Tensor {
        match self.form {
            Form::Dense | Form::Streamed => self.w.clone(),
            Form::Int8 => self.int8().dequantize().to_dtype(self.x.dtype()),
            Form::Nf4 => self.nf4().dequantize().to_dtype(self.x.dtype()),
        }
    }

    fn int8(&self) -> RowInt8 {
        RowInt8::quantize("w", &self.w).unwrap()
    }

    fn nf4(&self) -> QuantTensor {
        QuantTensor::quantize(&self.w, QuantType::Nf4, true).unwrap()
    }

    fn held(&self, device: Device) -> Held {
        match self.form {
            Form::Dense => Held::Dense(up(device, &self.w)),
            Form::Int8 => Held::Int8(Box::new(ops::place_int8(self.int8(), device).unwrap())),
            Form::Nf4 => Held::Nf4(Box::new(ops::place_quantized(self.nf4(), device).unwrap())),
            Form::Streamed => {
                let (_, k) = self.w.shape().rows_and_columns();
                let pieces = self.w.bytes().chunks(HEAD_CHUNK * k * self.w.dtype().size());
                let pinned = pieces.map(|bytes| {
                    let rows = bytes.len() / (k * self.w.dtype().size());
                    let mut piece = Tensor::zeros_pinned(device, self.w.dtype(), [rows, k]).unwrap();
                    piece.bytes_mut().copy_from_slice(bytes);
                    piece
                });
                Held::Streamed(pinned.collect())
            }
        }
    }

    /// [`Case::run`] on the device, logits of all rows by the head alone, and the panels as they are left.
    fn run_held(&self, device: Device) -> (f64, [Tensor; 3]) {
        let (rows, dtype) = (self.targets.elements(), self.x.dtype());
        let (vocabulary, k) = self.w.shape().rows_and_columns();
        let held = self.held(device);
        let (x, targets) = (up(device, &self.x), up(device, &self.targets));
        let mut scratch = HeadScratch::new(Compute { device, dtype }, held.as_ref(), self.room).unwrap();
        for buffer in scratch.panels.iter_mut().chain([&mut scratch.logits]) {
            *buffer = up(device, &nan(buffer.dtype(), buffer.shape()));
        }
        let mut statistics = up(device, &nan(DType::F32, [rows, STATISTICS]));
        let mut dx = up(device, &nan(DType::F32, [rows, k]));
        let mut logits = up(device, &nan(DType::F32, [rows, vocabulary]));
        let head = held.as_ref();
        let loss = ops::head_loss(&x, head, &targets, &mut scratch, &mut statistics).unwrap();
        let buffers = (&mut scratch, &statistics);
        ops::head_loss_backward(&x, head, &targets, SCALE, buffers, &mut dx, None).unwrap();
        ops::head_logits(&x, head, &mut scratch, &mut logits).unwrap();
        (loss, [statistics, dx, logits])
    }

    /// Loss, statistics, dx, dw: computed on `device` in sums of type `sums`. dw begins as ones.
    fn run(&self, device: Device, sums: DType) -> (f64, [Tensor; 3]) {
        let rows = self.targets.elements();
        let (vocabulary, k) = self.w.shape().rows_and_columns();
        let wide_if_host = |t: &Tensor| match device {
            Device::Cpu => wide(t),
            Device::Cuda(_) => up(device, t),
        };
        let (x, w) = (wide_if_host(&self.x), wide_if_host(&self.decoded()));
        let targets = up(device, &self.targets);
        let mut scratch = HeadScratch::of_logits(up(device, &nan(sums, [self.room])));
        let mut statistics = up(device, &nan(sums, [rows, STATISTICS]));
        let mut dx = up(device, &nan(sums, [rows, k]));
        let ones = Tensor::from_slice(&vec![1f32; vocabulary * k], [vocabulary, k]).to_dtype(sums);
        let mut dw = up(device, &ones);
        let w = WeightRef::Dense(&w);
        let loss = ops::head_loss(&x, w, &targets, &mut scratch, &mut statistics).unwrap();
        ops::head_loss_backward(
            &x,
            w,
            &targets,
            SCALE,
            (&mut scratch, &statistics),
            &mut dx,
            Some(&mut dw),
        )
        .unwrap();
        (loss, [statistics, dx, dw])
    }
}

#[test]
fn loss_and_gradients_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        // The whole vocabulary at once, chunks of a multiple of 64, of any size, of one; a row, few, many.
        for (rows, vocabulary, k, room) in [
            (1, 7, 64, 7),
            (5, 300, 40, 5 * 300),
            (5, 300, 40, 5 * 128),
            (5, 300, 40, 5 * 100),
            (5, 301, 33, 5 * 301),
            (5, 301, 33, 5 * 30),
            (20, 130, 64, 20 * 130),
            (70, 200, 72, 70 * 64),
            (3, 5, 16, 3),
            (2, 5_000, 16, 2 * 5_000),
        ] {
            let what = format!("head_loss {rows}x{vocabulary}x{k} room {room}");
            let case = Case::new(dtype, rows, vocabulary, k, room);
            let loss = std::cell::Cell::new(f64::NAN);
            let got = twice(&what, || {
                let (value, tensors) = case.run(device, DType::F32);
                loss.set(value);
                tensors.into()
            });
            let (want_loss, want) = case.run(Device::Cpu, DType::F64);
            // Logits of up to 20 have an error of some units in the last place of f32.
            let atol = 256.0 * epsilon(DType::F32) * rows as f64;
            assert_close(&what, &[loss.get()], &[want_loss], atol, 1e-6);
            // Exponentials have the absolute error of logits as relative one.
            let statistics = [down(&got[0]), want[0].clone()].map(|t| t.to_f64_vec());
            assert_close(
                &format!("{what}: statistics"),
                &statistics[0],
                &statistics[1],
                1e-5,
                1e-5,
            );
            // What is rounded to the compute type is softmax less one-hot, of size 1 at most.
            let terms = if dtype == DType::F32 { 64 * k } else { 2 };
            assert_matches(
                &format!("{what}: dx"),
                &got[1],
                &want[1],
                dtype,
                terms,
                0.3 * SCALE,
            );
            let terms = if dtype == DType::F32 { 64 * k } else { 2 * rows };
            assert_matches(&format!("{what}: dw"), &got[2], &want[2], dtype, terms, SCALE);
        }
    }
}

/// A head that trains is held in f32: the same as one of the compute type, if that can hold its numbers.
#[test]
fn a_head_in_f32_gives_the_same_loss_and_gradients() {
    let Some(device) = device() else { return };
    for dtype in [DType::F16, DType::BF16] {
        for (rows, vocabulary, k, room) in [
            (5, 300, 40, 5 * 300),
            (5, 301, 33, 5 * 30),
            (70, 200, 72, 70 * 64),
        ] {
            let what = format!("head_loss {rows}x{vocabulary}x{k} room {room}, head in f32");
            let mut case = Case::new(dtype, rows, vocabulary, k, room);
            let (_, narrow) = case.run(device, DType::F32);
            case.w = case.w.to_dtype(DType::F32);
            let got = twice(&what, || case.run(device, DType::F32).1.into());
            let (_, want) = case.run(Device::Cpu, DType::F64);
            let statistics = [down(&got[0]), want[0].clone()].map(|t| t.to_f64_vec());
            assert_close(&what, &statistics[0], &statistics[1], 1e-5, 1e-5);
            assert_matches(&format!("{what}: dx"), &got[1], &want[1], dtype, 2, 0.3 * SCALE);
            assert_matches(&format!("{what}: dw"), &got[2], &want[2], dtype, 2 * rows, SCALE);
            // Up to 16 rows the logits of a head in 16 bits are summed in another order.
            for (wide, narrow) in got.iter().zip(&narrow).filter(|_| rows > 16) {
                assert!(down(wide).bytes() == down(narrow).bytes(), "{what}: other bits");
            }
        }
    }
}

#[test]
fn a_small_scale_does_not_drown_the_gradient() {
    let Some(device) = device() else { return };
    // softmax / 2^16 is far below what f16 can hold, its sum over the vocabulary is not.
    let case = Case::new(DType::F16, 2, 2_000, 16, 4_000);
    let run = |device, sums| {
        let on = |t: &Tensor| {
            if sums == DType::F64 {
                wide(t)
            } else {
                up(device, t)
            }
        };
        let (x, w, targets) = (on(&case.x), on(&case.w), up(device, &case.targets));
        let mut scratch = HeadScratch::of_logits(up(device, &nan(sums, [case.room])));
        let mut statistics = up(device, &nan(sums, [2, STATISTICS]));
        let mut dx = up(device, &nan(sums, [2, 16]));
        let w = WeightRef::Dense(&w);
        ops::head_loss(&x, w, &targets, &mut scratch, &mut statistics).unwrap();
        let buffers = (&mut scratch, &statistics);
        ops::head_loss_backward(&x, w, &targets, 2f64.powi(-16), buffers, &mut dx, None).unwrap();
        dx
    };
    let got = run(device, DType::F32);
    let want = run(Device::Cpu, DType::F64);
    assert_matches("dx", &got, &want, DType::F16, 2, 0.3 * 2f64.powi(-16));
}

#[test]
fn nothing_wrong_passes_for_a_loss() {
    let Some(device) = device() else { return };
    for room in [3 * 100, 3 * 64] {
        for wrong in [-1, 100, i32::MAX] {
            let mut case = Case::new(DType::F16, 3, 100, 16, room);
            case.targets.as_mut_slice::<i32>()[1] = wrong;
            assert!(case.run(device, DType::F32).0.is_nan(), "target {wrong}");
        }
        let mut case = Case::new(DType::F32, 3, 100, 16, room);
        case.x.as_mut_slice::<f32>()[2 * 16] = f32::NAN;
        assert!(case.run(device, DType::F32).0.is_nan());
        let mut case = Case::new(DType::F32, 3, 100, 16, room);
        case.w.as_mut_slice::<f32>()[99 * 16] = f32::NAN;
        let (loss, [_, dx, _]) = case.run(device, DType::F32);
        assert!(loss.is_nan() && glmtune::ops::non_finite(&dx).unwrap().is_some());
    }
}

#[test]
fn no_labelled_row_is_no_loss() {
    let Some(device) = device() else { return };
    let case = Case::new(DType::F16, 0, 100, 16, 100);
    assert_eq!(case.run(device, DType::F32).0, 0.0);
}

/// Loss, gradient and logits of every form of a head are those of the CPU with what the form holds; where a form is decoded to
/// a dense matrix on the way to the same products, they are those of that matrix to the bit.
#[test]
fn every_form_of_a_head_is_the_matrix_that_it_holds() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        // One chunk, chunks within a panel, odd sizes, a row and many, panels with an odd rest.
        for (rows, vocabulary, k, room) in [
            (1, 7, 64, 7),
            (5, 300, 64, 5 * 300),
            (5, 301, 128, 5 * 128),
            (20, 130, 64, 20 * 130),
            (70, 201, 64, 70 * 64),
            (2, 2 * HEAD_CHUNK + 77, 64, 2 * (2 * HEAD_CHUNK + 77)),
            (2, HEAD_CHUNK + 33, 64, 2 * 5000),
        ] {
            let mut case = Case::new(dtype, rows, vocabulary, k, room);
            for form in [Form::Dense, Form::Streamed, Form::Int8, Form::Nf4] {
                let what = format!("{form:?} head {rows}x{vocabulary}x{k} room {room}");
                case.form = form;
                let loss = std::cell::Cell::new(f64::NAN);
                let got = twice(&what, || {
                    let (value, tensors) = case.run_held(device);
                    loss.set(value);
                    tensors.into()
                });
                // Few rows meet codes, and their sums the scales: the matrix is not rounded.
                let codes = form == Form::Int8 && dtype != DType::F32 && rows <= 16;
                let dense = Case {
                    form: Form::Dense,
                    w: if codes {
                        case.int8().dequantize()
                    } else {
                        case.decoded()
                    },
                    x: case.x.clone(),
                    targets: case.targets.clone(),
                    room,
                };
                if !codes {
                    let (same_loss, same) = dense.run_held(device);
                    assert_eq!(loss.get(), same_loss, "{what} {dtype}");
                    // Logits alone have kernels for 4 bits.
                    let compared = if form == Form::Nf4 { 2 } else { 3 };
                    for (i, (got, want)) in got.iter().zip(&same).take(compared).enumerate() {
                        assert!(
                            down(got).bytes() == down(want).bytes(),
                            "{what} {dtype}: output {i}"
                        );
                    }
                }
                let (want_loss, want) = dense.run(Device::Cpu, DType::F64);
                let atol = 256.0 * epsilon(DType::F32) * rows as f64;
                assert_close(&what, &[loss.get()], &[want_loss], atol, 1e-6);
                let statistics = [down(&got[0]), want[0].clone()].map(|t| t.to_f64_vec());
                assert_close(&what, &statistics[0], &statistics[1], 1e-5, 1e-5);
                let terms = if dtype == DType::F32 { 64 * k } else { 2 };
                assert_matches(&what, &got[1], &want[1], dtype, terms, 0.3 * SCALE);
                // The table of 4 bits is rounded to the compute type ahead of its scale.
                let of = if form == Form::Nf4 { dtype } else { DType::F32 };
                let mut logits = nan(DType::F64, [rows, vocabulary]);
                let (x, w) = (wide(&case.x), wide(&dense.w));
                ops::linear(&x, WeightRef::Dense(&w), None, None, &mut logits).unwrap();
                assert_matches(&format!("{what}: logits"), &got[2], &logits, of, 64 * k, 0.3);
            }
        }
    }
}

/// Panels of whole products and of products cut along K: logits are those of the dense head to the bit, and those of
/// the CPU.
#[test]
fn logits_of_panels_lie_beside_each_other() {
    let Some(device) = device() else { return };
    let (rows, vocabulary) = (17, HEAD_CHUNK + 33);
    for (dtype, k) in [(DType::F32, 512), (DType::F16, 64), (DType::F16, 512)] {
        let mut case = Case::new(dtype, rows, vocabulary, k, 0);
        let logits = |case: &Case| {
            let held = case.held(device);
            let x = up(device, &case.x);
            let mut scratch = HeadScratch::new(Compute { device, dtype }, held.as_ref(), 0).unwrap();
            let mut y = up(device, &nan(DType::F32, [rows, vocabulary]));
            ops::head_logits(&x, held.as_ref(), &mut scratch, &mut y).unwrap();
            down(&y)
        };
        let dense = logits(&case);
        case.form = Form::Streamed;
        assert!(logits(&case).bytes() == dense.bytes(), "{dtype} {k}");
        let mut want = nan(DType::F64, [rows, vocabulary]);
        let (x, w) = (wide(&case.x), wide(&case.w));
        ops::linear(&x, WeightRef::Dense(&w), None, None, &mut want).unwrap();
        // Twice the deviation of the weights, as for other products.
        assert_matches("logits", &dense, &want, DType::F32, 64 * k, 0.6);
    }
}

#[test]
fn a_head_without_the_panels_that_it_needs_is_refused() {
    let Some(device) = device() else { return };
    let mut case = Case::new(DType::F16, 2, 100, 64, 200);
    for form in [Form::Streamed, Form::Nf4] {
        case.form = form;
        let held = case.held(device);
        let (x, targets) = (up(device, &case.x), up(device, &case.targets));
        let mut scratch = HeadScratch::of_logits(up(device, &nan(DType::F32, [200])));
        let mut statistics = up(device, &nan(DType::F32, [2, STATISTICS]));
        let result = ops::head_loss(&x, held.as_ref(), &targets, &mut scratch, &mut statistics);
        assert!(result.unwrap_err().to_string().contains("panels"));
    }
}
