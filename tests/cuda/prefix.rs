//! Keys and values of a layer out of a prefix's table, with dropout and back; tanh.

use glmtune::ops;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Device, Tensor};

use crate::{TYPES, assert_matches, device, down, nan, random, twice, up, wide};

/// Sequences (0: a prefix of all), heads, positions, elements of a head, keys and values in the table, the one taken. Heads
/// that fit no vector, more than a strip of columns, the real ones.
const CASES: [[usize; 6]; 6] = [
    [0, 1, 1, 1, 2, 1],
    [2, 2, 3, 4, 6, 5],
    [3, 3, 5, 20, 4, 0],
    [0, 4, 8, 16, 6, 3],
    [2, 2, 3, 24, 3, 2],
    [2, 32, 2, 128, 4, 1],
];

fn shape([size, heads, length, d, ..]: [usize; 6]) -> Vec<usize> {
    match size {
        0 => vec![heads, length, d],
        _ => vec![size, heads, length, d],
    }
}

#[test]
fn prefix_heads_and_their_gradient_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for case in CASES {
            let [_, heads, length, d, count, index] = case;
            let shape = glmtune::tensor::Shape::new(&shape(case));
            let table = random(DType::F32, [length, count * heads * d], 1, 1.0);
            for dropout in [None, Some((0.3, Stream::new(5, 6)))] {
                let what = format!("{case:?} {}", dropout.is_some());
                let got = twice(&what, || {
                    let mut y = up(device, &nan(dtype, shape));
                    ops::prefix_heads(&up(device, &table), index, dropout, &mut y).unwrap();
                    vec![y]
                });
                let mut want = nan(DType::F64, shape);
                ops::prefix_heads(&wide(&table), index, dropout, &mut want).unwrap();
                assert_matches(&what, &got[0], &want, dtype, 1, 1.0);
                if dtype != DType::F32 {
                    continue;
                }
                let dy = random(DType::F32, shape, 2, 1.0);
                let before = random(DType::F32, table.shape(), 3, 1.0);
                let backward = |device: Device, placed: &dyn Fn(&Tensor) -> Tensor| {
                    let mut d_table = placed(&before);
                    ops::prefix_heads_backward(&placed(&dy), index, dropout, &mut d_table).unwrap();
                    assert_eq!(d_table.device(), device);
                    d_table
                };
                let got = twice(&what, || vec![backward(device, &|t| up(device, t))]);
                let want = backward(Device::Cpu, &wide);
                let size = case[0].max(1);
                assert_matches(&format!("d_table {what}"), &got[0], &want, dtype, size, 1.0);
            }
        }
    }
}

/// What no sequence gives to keeps its gradient, to the bit.
#[test]
fn other_columns_stay_as_they_are() {
    let Some(device) = device() else { return };
    let before = random(DType::F32, [3, 4 * 2 * 8], 3, 1.0);
    let mut d_table = up(device, &before);
    let dy = up(device, &random(DType::F32, [2, 2, 3, 8], 2, 1.0));
    ops::prefix_heads_backward(&dy, 1, None, &mut d_table).unwrap();
    let (got, want) = (down(&d_table), before);
    for (i, (got, want)) in got
        .as_slice::<f32>()
        .iter()
        .zip(want.as_slice::<f32>())
        .enumerate()
    {
        let taken = (16..32).contains(&(i % 64));
        assert_eq!(got == want, !taken, "element {i}");
    }
}

#[test]
fn tanh_is_that_of_the_cpu() {
    let Some(device) = device() else { return };
    for n in [1, 3, 4, 1023, 1024, 1025] {
        let x = random(DType::F32, [n], 1, 2.0);
        let got = twice("tanh", || {
            let mut y = up(device, &nan(DType::F32, [n]));
            ops::tanh(&up(device, &x), &mut y).unwrap();
            vec![y]
        });
        let mut want = nan(DType::F64, [n]);
        ops::tanh(&wide(&x), &mut want).unwrap();
        assert_matches("tanh", &got[0], &want, DType::F32, 1, 1.0);

        let (y, dy) = (down(&got[0]), random(DType::F32, [n], 2, 1.0));
        let got = twice("tanh_backward", || {
            let mut d = up(device, &dy);
            ops::tanh_backward(&up(device, &y), &mut d).unwrap();
            vec![d]
        });
        let mut want = wide(&dy);
        ops::tanh_backward(&wide(&y), &mut want).unwrap();
        assert_matches("tanh_backward", &got[0], &want, DType::F32, 4, 1.0);
    }
}
