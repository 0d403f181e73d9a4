//! Head and cross-entropy.

use glmtune::ops::{self, STATISTICS, WeightRef};
use glmtune::tensor::{DType, Device, Tensor};

use crate::common::assert_close;
use crate::{TYPES, assert_matches, device, down, epsilon, nan, random, twice, up, wide};

const SCALE: f64 = 0.125;

struct Case {
    x: Tensor,
    w: Tensor,
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
            targets: Tensor::from_slice(&targets, [rows]),
            room,
        }
    }

    /// Loss, statistics, dx, dw: computed on `device` in sums of type `sums`. dw begins as ones.
    fn run(&self, device: Device, sums: DType) -> (f64, [Tensor; 3]) {
        let rows = self.targets.elements();
        let (vocabulary, k) = self.w.shape().rows_and_columns();
        let wide_if_host = |t: &Tensor| match device {
            Device::Cpu => wide(t),
            Device::Cuda(_) => up(device, t),
        };
        let (x, w) = (wide_if_host(&self.x), wide_if_host(&self.w));
        let targets = up(device, &self.targets);
        let mut logits = up(device, &nan(sums, [self.room]));
        let mut statistics = up(device, &nan(sums, [rows, STATISTICS]));
        let mut dx = up(device, &nan(sums, [rows, k]));
        let ones = Tensor::from_slice(&vec![1f32; vocabulary * k], [vocabulary, k]).to_dtype(sums);
        let mut dw = up(device, &ones);
        let w = WeightRef::Dense(&w);
        let loss = ops::head_loss(&x, w, &targets, &mut logits, &mut statistics).unwrap();
        ops::head_loss_backward(
            &x,
            w,
            &targets,
            SCALE,
            (&mut logits, &statistics),
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
            case.w = case.w.to_dtype(DType::F32);
            let got = twice(&what, || case.run(device, DType::F32).1.into());
            let (_, want) = case.run(Device::Cpu, DType::F64);
            let statistics = [down(&got[0]), want[0].clone()].map(|t| t.to_f64_vec());
            assert_close(&what, &statistics[0], &statistics[1], 1e-5, 1e-5);
            assert_matches(&format!("{what}: dx"), &got[1], &want[1], dtype, 2, 0.3 * SCALE);
            assert_matches(&format!("{what}: dw"), &got[2], &want[2], dtype, 2 * rows, SCALE);
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
        let mut logits = up(device, &nan(sums, [case.room]));
        let mut statistics = up(device, &nan(sums, [2, STATISTICS]));
        let mut dx = up(device, &nan(sums, [2, 16]));
        let w = WeightRef::Dense(&w);
        ops::head_loss(&x, w, &targets, &mut logits, &mut statistics).unwrap();
        let scratch = (&mut logits, &statistics);
        ops::head_loss_backward(&x, w, &targets, 2f64.powi(-16), scratch, &mut dx, None).unwrap();
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
