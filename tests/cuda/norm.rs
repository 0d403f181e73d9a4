//! LayerNorm, and sums over rows.

use glmtune::ops;
use glmtune::tensor::{DType, Tensor};

use super::{TYPES, assert_matches, device, nan, random, twice, up, wide};

/// `[M, N]`: the least, around a warp's and a block's columns, widths that fit no vector, a real width, the widest; rows
/// around a part of a sum, and more rows than one part has at least.
const SHAPES: [(usize, usize); 14] = [
    (1, 2),
    (2, 3),
    (3, 8),
    (5, 31),
    (4, 64),
    (3, 511),
    (3, 512),
    (2, 513),
    (3, 1000),
    (3, 4096),
    (1, 16384),
    (63, 24),
    (65, 40),
    (4200, 12),
];

#[test]
fn layer_norm() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (m, n) in SHAPES {
            let x = random(dtype, [m, n], 1, 2.0);
            let (w, b) = (random(DType::F32, [n], 2, 1.0), random(DType::F32, [n], 3, 1.0));
            let mut want = (
                Tensor::zeros(DType::F64, [m, n]),
                Tensor::zeros(DType::F64, [m, 2]),
            );
            let (x64, w64, b64) = (wide(&x), wide(&w), wide(&b));
            ops::layer_norm(&x64, &w64, &b64, 1e-5, &mut want.0, &mut want.1).unwrap();
            let got = twice("layer_norm", || {
                let mut y = up(device, &nan(dtype, [m, n]));
                let mut stats = up(device, &nan(DType::F32, [m, 2]));
                let (x, w, b) = (up(device, &x), up(device, &w), up(device, &b));
                ops::layer_norm(&x, &w, &b, 1e-5, &mut y, &mut stats).unwrap();
                vec![y, stats]
            });
            // In F32 as many roundings as a thread has terms; in the 16-bit types only the last one counts.
            let k = if dtype == DType::F32 { 16 } else { 1 };
            // Two numbers close to each other have a large rstd.
            let scale = want
                .1
                .to_f64_vec()
                .into_iter()
                .fold(3.0, |a: f64, b| a.max(b.abs()));
            assert_matches(&format!("layer_norm {m} {n}"), &got[0], &want.0, dtype, k, scale);
            let what = format!("layer_norm {m} {n}: statistics");
            assert_matches(&what, &got[1], &want.1, DType::F32, 16, scale);
        }
    }
}

#[test]
fn layer_norm_backward() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (m, n) in SHAPES {
            let (x, dy) = (random(dtype, [m, n], 1, 2.0), random(dtype, [m, n], 4, 1.0));
            let (w, b) = (random(DType::F32, [n], 2, 1.0), random(DType::F32, [n], 3, 1.0));
            let (x64, dy64, w64) = (wide(&x), wide(&dy), wide(&w));
            let mut stats = Tensor::zeros(DType::F64, [m, 2]);
            let mut want = Tensor::zeros(DType::F64, [m, n]);
            ops::layer_norm(&x64, &w64, &wide(&b), 1e-5, &mut want, &mut stats).unwrap();
            let stats = stats.to_dtype(DType::F32);
            ops::layer_norm_backward_input(&dy64, &x64, &w64, &wide(&stats), &mut want).unwrap();
            let got = twice("layer_norm_backward_input", || {
                let mut dx = up(device, &nan(dtype, [m, n]));
                let (dy, x) = (up(device, &dy), up(device, &x));
                let (w, stats) = (up(device, &w), up(device, &stats));
                ops::layer_norm_backward_input(&dy, &x, &w, &stats, &mut dx).unwrap();
                vec![dx]
            });
            let k = if dtype == DType::F32 { 16 } else { 1 };
            let rstd = stats
                .to_f64_vec()
                .into_iter()
                .skip(1)
                .step_by(2)
                .fold(1.0, f64::max);
            let what = format!("layer_norm_backward_input {m} {n}");
            assert_matches(&what, &got[0], &want, dtype, k, 3.0 * rstd);

            let (dw, db) = (random(DType::F32, [n], 5, 1.0), random(DType::F32, [n], 6, 1.0));
            let mut want = (wide(&dw), wide(&db));
            ops::layer_norm_backward_parameters(&dy64, &x64, &wide(&stats), &mut want.0, &mut want.1)
                .unwrap();
            let got = twice("layer_norm_backward_parameters", || {
                let (mut dw, mut db) = (up(device, &dw), up(device, &db));
                let (dy, x, stats) = (up(device, &dy), up(device, &x), up(device, &stats));
                ops::layer_norm_backward_parameters(&dy, &x, &stats, &mut dw, &mut db).unwrap();
                vec![dw, db]
            });
            let what = format!("layer_norm_backward_parameters {m} {n}");
            assert_matches(&what, &got[0], &want.0, DType::F32, m, 3.0);
            assert_matches(&what, &got[1], &want.1, DType::F32, m, 3.0);
        }
    }
}

#[test]
fn a_row_wider_than_the_registers_is_refused() {
    let Some(device) = device() else { return };
    let n = 16385;
    let x = up(device, &Tensor::zeros(DType::F32, [1, n]));
    let w = up(device, &Tensor::zeros(DType::F32, [n]));
    let mut y = up(device, &Tensor::zeros(DType::F32, [1, n]));
    let mut stats = up(device, &Tensor::zeros(DType::F32, [1, 2]));
    let error = ops::layer_norm(&x, &w, &w, 1e-5, &mut y, &mut stats).unwrap_err();
    assert!(error.to_string().contains("16385"), "{error}");
}

#[test]
fn accumulate_column_sums() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (m, n) in SHAPES {
            let dy = random(dtype, [m, n], 1, 1.0);
            let db = random(DType::F32, [n], 2, 1.0);
            let mut want = wide(&db);
            ops::accumulate_column_sums(&wide(&dy), &mut want).unwrap();
            let got = twice("accumulate_column_sums", || {
                let mut db = up(device, &db);
                ops::accumulate_column_sums(&up(device, &dy), &mut db).unwrap();
                vec![db]
            });
            let what = format!("accumulate_column_sums {m} {n}");
            assert_matches(&what, &got[0], &want, DType::F32, m, 3.0);
        }
    }
}
