//! Rows of matrices by number. Nothing is computed but a conversion: everything is equal to the bit.

use glmtune::ops;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Tensor};

use super::{TYPES, device, down, nan, random, twice, up};

/// `(R, M, N)`: R numbers of rows of an [M, N] matrix. The least, widths that fit no vector, more than one strip of
/// columns, a real width, more numbers than a block has threads.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (3, 5, 7),
    (5, 9, 8),
    (9, 4, 33),
    (300, 7, 40),
    (3, 6, 2048),
    (4, 3, 2056),
    (3, 10, 4096),
    (700, 300, 16),
];

fn numbers(r: usize, m: usize) -> Tensor {
    let stream = Stream::new(9, 0);
    let numbers: Vec<i32> = (0..r as u64).map(|i| stream.below(i, m) as i32).collect();
    Tensor::from_slice(&numbers, [r])
}

/// Rows `rows` of `x`, taken with the CPU's eyes; NaN for what lies outside.
fn taken(x: &Tensor, rows: &[i32]) -> Tensor {
    let (m, n) = x.shape().rows_and_columns();
    let mut y = nan(x.dtype(), [rows.len(), n]);
    let row = n * x.dtype().size();
    for (to, &from) in y.bytes_mut().chunks_exact_mut(row).zip(rows) {
        if (0..m as i32).contains(&from) {
            to.copy_from_slice(&x.bytes()[from as usize * row..][..row]);
        }
    }
    y
}

#[track_caller]
fn assert_equal(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dtype(), want.dtype(), "{what}");
    let (got, want) = (down(got).to_f64_vec(), want.to_f64_vec());
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        assert!(same, "{what}: element {i} is {got}, not {want}");
    }
}

#[test]
fn rows_are_gathered() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (r, m, n) in SHAPES {
            let (x, mut rows) = (random(dtype, [m, n], 1, 1.0), numbers(r, m));
            for outside in [false, true] {
                if outside {
                    rows.as_mut_slice::<i32>()[0] = -1;
                    rows.as_mut_slice::<i32>()[r / 2] = m as i32;
                }
                let want = taken(&x, rows.as_slice());
                let what = format!("{r} of {m} {n} {dtype} {outside}");
                let got = twice(&what, || {
                    let (x, rows) = (up(device, &x), up(device, &rows));
                    let mut by_row = up(device, &Tensor::zeros(dtype, [r, n]));
                    let mut by_id = up(device, &Tensor::zeros(dtype, [r, n]));
                    ops::gather_rows(&x, &rows, &mut by_row).unwrap();
                    ops::embedding(&x, &rows, &mut by_id).unwrap();
                    vec![by_row, by_id]
                });
                assert_equal(&format!("gather_rows {what}"), &got[0], &want);
                assert_equal(&format!("embedding {what}"), &got[1], &want);
            }
        }
    }
}

/// An embedding that trains is held in f32 on every device.
#[test]
fn an_embedding_in_f32_is_rounded() {
    let Some(device) = device() else { return };
    for dtype in [DType::F16, DType::BF16] {
        for (r, m, n) in SHAPES {
            let (x, mut ids) = (random(DType::F32, [m, n], 1, 1.0), numbers(r, m));
            ids.as_mut_slice::<i32>()[r / 2] = m as i32;
            let want = taken(&x, ids.as_slice()).to_dtype(dtype);
            let what = format!("embedding {r} of {m} {n} {dtype}");
            let got = twice(&what, || {
                let mut y = up(device, &Tensor::zeros(dtype, [r, n]));
                ops::embedding(&up(device, &x), &up(device, &ids), &mut y).unwrap();
                vec![y]
            });
            assert_equal(&what, &got[0], &want);
        }
    }
}

#[test]
fn an_embedding_of_another_type_is_refused() {
    let Some(device) = device() else { return };
    let w = up(device, &Tensor::zeros(DType::BF16, [3, 8]));
    let ids = up(device, &Tensor::from_slice(&[0i32], [1]));
    let mut y = up(device, &Tensor::zeros(DType::F16, [1, 8]));
    assert!(ops::embedding(&w, &ids, &mut y).is_err());
}

#[test]
fn rows_are_scattered() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (r, m, n) in SHAPES {
            let r = r.min(m);
            let order = Stream::new(5, m as u64).permutation(m);
            let rows: Vec<i32> = order[..r].iter().map(|&row| row as i32).collect();
            let x = random(DType::F32, [r, n], 1, 1.0);
            let mut wide = Tensor::zeros(DType::F32, [m, n]);
            ops::scatter_rows(&x, &Tensor::from_slice(&rows, [r]), &mut wide).unwrap();
            let want = wide.to_dtype(dtype);
            let run = |rows: &[i32]| {
                let mut y = up(device, &nan(dtype, [m, n]));
                let rows = up(device, &Tensor::from_slice(rows, [r]));
                ops::scatter_rows(&up(device, &x), &rows, &mut y).unwrap();
                vec![y]
            };
            let what = format!("scatter_rows {r} {m} {n} {dtype}");
            let got = twice(&what, || run(&rows));
            assert_equal(&what, &got[0], &want);
            // One number outside spoils everything: there is no row to say so in.
            let mut wrong = rows.clone();
            wrong[r / 2] = m as i32;
            assert_equal(&what, &run(&wrong)[0], &nan(dtype, [m, n]));
        }
        let mut y = up(device, &nan(dtype, [5, 24]));
        let none = up(device, &Tensor::zeros(DType::I32, [0]));
        let x = up(device, &Tensor::zeros(DType::F32, [0, 24]));
        ops::scatter_rows(&x, &none, &mut y).unwrap();
        assert_equal("no rows", &y, &Tensor::zeros(dtype, [5, 24]));
    }
}

#[test]
fn embedding_backward_adds_the_rows_of_an_id_in_order() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (r, v, n) in SHAPES {
            let (dy, dw) = (random(dtype, [r, n], 1, 1.0), random(DType::F32, [v, n], 2, 1.0));
            for ids in [numbers(r, v), Tensor::from_slice(&vec![v as i32 - 1; r], [r])] {
                let mut want = dw.clone();
                ops::embedding_backward(&dy.to_dtype(DType::F32), &ids, &mut want).unwrap();
                let what = format!("embedding_backward {r} {v} {n} {dtype}");
                let got = twice(&what, || {
                    let mut dw = up(device, &dw);
                    ops::embedding_backward(&up(device, &dy), &up(device, &ids), &mut dw).unwrap();
                    vec![dw]
                });
                assert_equal(&what, &got[0], &want);
            }
        }
        let mut dw = up(device, &Tensor::zeros(DType::F32, [3, 8]));
        let ids = up(device, &Tensor::from_slice(&[-1i32, 1, 3], [3]));
        let dy = up(device, &random(dtype, [3, 8], 1, 1.0));
        ops::embedding_backward(&dy, &ids, &mut dw).unwrap();
        let rows = down(&dw).to_f64_vec();
        let touched: Vec<bool> = rows.chunks(8).map(|row| row.iter().any(|&x| x != 0.0)).collect();
        assert_eq!(touched, [false, true, false], "ids outside have no row");
    }
}

/// Rows gathered on the host and copied are those that the device gathers from the same matrix, converted as it was uploaded.
#[test]
fn an_embedding_on_the_host_is_that_of_the_device() {
    let Some(device) = device() else { return };
    for stored in [DType::F32, DType::F16, DType::BF16] {
        for dtype in TYPES {
            for (r, m, n) in [(1, 1, 1), (5, 9, 8), (9, 4, 33), (40, 10, 4096)] {
                let (w, ids) = (random(stored, [m, n], 1, 1.0), numbers(r, m));
                let there = w.to_device_as(device, dtype).unwrap();
                let mut want = up(device, &nan(dtype, [r, n]));
                ops::embedding(&there, &up(device, &ids), &mut want).unwrap();
                let got = twice("embedding_from_host", || {
                    let mut staging = Tensor::zeros_pinned(device, dtype, [r + 3, n]).unwrap();
                    let mut y = up(device, &nan(dtype, [r, n]));
                    // Twice through the same staging memory: the second waits for the first.
                    for _ in 0..2 {
                        ops::embedding_from_host(&w, ids.as_slice(), &mut staging, &mut y).unwrap();
                    }
                    vec![y]
                });
                let what = format!("{stored} to {dtype} {r} of {m} x {n}");
                assert!(down(&got[0]).bytes() == down(&want).bytes(), "{what}");
            }
        }
    }
}
