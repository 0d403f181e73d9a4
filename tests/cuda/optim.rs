//! The optimizer over many parameters at once, and the search for what is no number.

use glmtune::ops::{self, Adamw8bitSlot, AdamwSlot, LionSlot, SgdSlot, Span};
use glmtune::tensor::{DType, Device, Tensor};

use super::{TYPES, assert_matches, device, down, random, twice, up, wide};

/// Around a vector, a block's pass and a chunk.
const SIZES: [usize; 10] = [1, 3, 4, 5, 1023, 1025, 16383, 16384, 16385, 40_000];

const ADAMW: ops::AdamW = ops::AdamW {
    clip: 0.7,
    one_minus_beta1: 0.1,
    beta2: 0.999,
    one_minus_beta2: 0.001,
    sqrt_correction2: 0.3,
    epsilon: 1e-8,
};

fn parameters(seed: u64) -> Vec<Tensor> {
    let random = |(i, &n): (usize, &usize)| random(DType::F32, [n], seed + i as u64, 1.0);
    SIZES.iter().enumerate().map(random).collect()
}

/// Parameters `(p, g, m, v)` on `device`, v from 0.
fn filled(device: Device) -> [Vec<Tensor>; 4] {
    let mut squares = parameters(40);
    for v in &mut squares {
        v.as_mut_slice::<f32>().iter_mut().for_each(|x| *x *= *x);
    }
    [parameters(10), parameters(20), parameters(30), squares]
        .map(|tensors| tensors.iter().map(|t| up(device, t)).collect())
}

/// Every second parameter is not decayed, and every third has a learning rate of its own.
fn decay_and_rate(i: usize) -> (f32, f32) {
    let decay = if i.is_multiple_of(2) { 0.99 } else { 1.0 };
    (decay, if i.is_multiple_of(3) { 0.04 } else { 0.01 })
}

/// A step of an optimizer on the device leaves the bits that it leaves on the CPU.
#[track_caller]
fn has_the_bits_of_the_cpu(what: &str, step: impl Fn(Device) -> Vec<Tensor>) {
    let Some(device) = device() else { return };
    let got = twice(what, || step(device));
    for (i, (got, want)) in got.iter().zip(step(Device::Cpu)).enumerate() {
        let (got, place) = (down(got), format!("{what}, output {i} {}", want.shape()));
        if want.dtype() == DType::F32 {
            let bits = |t: &Tensor| {
                t.as_slice::<f32>()
                    .iter()
                    .map(|x| x.to_bits())
                    .collect::<Vec<_>>()
            };
            let (got, want) = (bits(&got), bits(&want));
            let other = got.iter().zip(&want).position(|(a, b)| a != b);
            if let Some(k) = other {
                panic!(
                    "{place}: {} is {}, not {}",
                    k,
                    f32::from_bits(got[k]),
                    f32::from_bits(want[k])
                );
            }
        }
        assert!(got.bytes() == want.bytes(), "{place}");
    }
}

#[test]
fn adamw() {
    has_the_bits_of_the_cpu("adamw", |device| {
        let [mut p, g, mut m, mut v] = filled(device);
        let mut slots: Vec<AdamwSlot> = (p.iter_mut().zip(&g))
            .zip(m.iter_mut().zip(&mut v))
            .enumerate()
            .map(|(i, ((p, g), (m, v)))| {
                let (decay, rate) = decay_and_rate(i);
                let spans = vec![Span::whole(p, g, rate, decay)];
                AdamwSlot { m, v, spans }
            })
            .collect();
        ops::adamw(&mut slots, &ADAMW).unwrap();
        p.into_iter().chain(m).chain(v).collect()
    });
}

#[test]
fn adamw_8bit() {
    has_the_bits_of_the_cpu("adamw_8bit", |device| {
        let [mut p, g, ..] = filled(device);
        let zeros = |dtype, block: usize| -> Vec<Tensor> {
            let n = SIZES.iter().map(|n| n.div_ceil(block));
            n.map(|n| Tensor::zeros_on(device, dtype, [n]).unwrap()).collect()
        };
        let (mut m, mut v) = (zeros(DType::U8, 1), zeros(DType::U8, 1));
        let [mut m_absmax, mut v_absmax] = [0, 1].map(|_| zeros(DType::F32, ops::BLOCK_8BIT));
        // The second step starts from codes, the third from those of smaller gradients: every decade of the maps is used.
        for clip in [0.7, 1.0, 1e-3] {
            let mut slots = Vec::new();
            let codes = m.iter_mut().zip(&mut v);
            let scales = m_absmax.iter_mut().zip(&mut v_absmax);
            let all = p.iter_mut().zip(&g).zip(codes.zip(scales)).enumerate();
            for (i, ((p, g), ((m, v), (m_absmax, v_absmax)))) in all {
                let (decay, rate) = decay_and_rate(i);
                slots.push(Adamw8bitSlot {
                    m,
                    v,
                    m_absmax,
                    v_absmax,
                    spans: vec![Span::whole(p, g, rate, decay)],
                });
            }
            ops::adamw_8bit(&mut slots, &ops::AdamW { clip, ..ADAMW }).unwrap();
        }
        let codes = m.into_iter().chain(v);
        let scales = m_absmax.into_iter().chain(v_absmax);
        p.into_iter().chain(codes).chain(scales).collect()
    });
}

#[test]
fn sgd() {
    for momentum in [false, true] {
        has_the_bits_of_the_cpu("sgd", |device| {
            let [mut p, g, mut m, _] = filled(device);
            let mut slots = Vec::new();
            for (i, ((p, g), m)) in p.iter_mut().zip(&g).zip(&mut m).enumerate() {
                let (weight_decay, rate) = decay_and_rate(i);
                slots.push(SgdSlot {
                    // Both kinds in one launch.
                    m: (momentum || i.is_multiple_of(4)).then_some(m),
                    spans: vec![Span::whole(p, g, rate, weight_decay)],
                });
            }
            let factors = ops::Sgd {
                clip: 0.7,
                momentum: 0.9,
            };
            ops::sgd(&mut slots, &factors).unwrap();
            p.into_iter().chain(m).collect()
        });
    }
}

#[test]
fn lion() {
    has_the_bits_of_the_cpu("lion", |device| {
        let [mut p, mut g, mut m, _] = filled(device);
        // No gradient and no momentum: no step.
        g[5].zero().unwrap();
        m[5].zero().unwrap();
        let mut slots = Vec::new();
        for (i, ((p, g), m)) in p.iter_mut().zip(&g).zip(&mut m).enumerate() {
            let (decay, rate) = decay_and_rate(i);
            let spans = vec![Span::whole(p, g, rate, decay)];
            slots.push(LionSlot { m, spans });
        }
        let factors = ops::Lion {
            clip: 0.7,
            beta1: 0.9,
            one_minus_beta1: 0.1,
            beta2: 0.99,
            one_minus_beta2: 0.01,
        };
        ops::lion(&mut slots, &factors).unwrap();
        p.into_iter().chain(m).collect()
    });
}

/// Ranges of parameters and gradients whose state shares tensors, around vectors, blocks and chunks; what lies between the
/// ranges stays as it is.
#[test]
fn spans() {
    // Where they begin in the parameter, the gradient and the state, and how long they are.
    let ranges = [
        (0, 256, 0, 1000),
        (5, 3, 1024, 16_390),
        (256, 512, 17_920, 1),
        (1, 0, 18_176, 259),
        (4, 8, 18_688, 16_384),
    ];
    const STATE: usize = 36_000;
    for rule in 0..4 {
        has_the_bits_of_the_cpu(&format!("spans {rule}"), |device| {
            let tensor = |n: usize, seed| up(device, &random(DType::F32, [n], seed, 1.0));
            let mut p: Vec<Tensor> = (0..5).map(|i| tensor(17_000, i)).collect();
            let g: Vec<Tensor> = (0..5).map(|i| tensor(17_000, 10 + i)).collect();
            let mut squares = random(DType::F32, [STATE], 21, 1.0);
            squares.as_mut_slice::<f32>().iter_mut().for_each(|x| *x *= *x);
            let (mut m, mut v) = (tensor(STATE, 20), up(device, &squares));
            let codes = || Tensor::zeros_on(device, DType::U8, [STATE]).unwrap();
            let scales = || Tensor::zeros_on(device, DType::F32, [STATE.div_ceil(ops::BLOCK_8BIT)]).unwrap();
            let [mut m_codes, mut v_codes] = [codes(), codes()];
            let [mut m_absmax, mut v_absmax] = [scales(), scales()];
            for _ in 0..2 {
                let all = p.iter_mut().zip(&g).zip(ranges).enumerate();
                let spans = all.map(|(i, ((p, g), (p_at, g_at, state_at, len)))| {
                    let (decay, rate) = decay_and_rate(i);
                    Span {
                        p,
                        g,
                        p_at,
                        g_at,
                        state_at,
                        len,
                        rate,
                        decay,
                    }
                });
                let spans: Vec<Span> = spans.collect();
                match rule {
                    0 => {
                        let (m, v) = (&mut m, &mut v);
                        ops::adamw(&mut [AdamwSlot { m, v, spans }], &ADAMW)
                    }
                    1 => {
                        let slot = Adamw8bitSlot {
                            m: &mut m_codes,
                            v: &mut v_codes,
                            m_absmax: &mut m_absmax,
                            v_absmax: &mut v_absmax,
                            spans,
                        };
                        ops::adamw_8bit(&mut [slot], &ADAMW)
                    }
                    2 => {
                        let factors = ops::Sgd {
                            clip: 0.7,
                            momentum: 0.9,
                        };
                        let m = Some(&mut m);
                        ops::sgd(&mut [SgdSlot { m, spans }], &factors)
                    }
                    _ => {
                        let factors = ops::Lion {
                            clip: 0.7,
                            beta1: 0.9,
                            one_minus_beta1: 0.1,
                            beta2: 0.99,
                            one_minus_beta2: 0.01,
                        };
                        ops::lion(&mut [LionSlot { m: &mut m, spans }], &factors)
                    }
                }
                .unwrap();
            }
            p.extend([m, v, m_codes, v_codes, m_absmax, v_absmax]);
            p
        });
    }
}

#[test]
fn round_into() {
    for dtype in [DType::F16, DType::BF16] {
        for (range, at) in [
            (0..5000, 0),
            (256..4097, 512),
            (3..4000, 1),
            (7..8, 4999),
            (9..9, 5000),
        ] {
            has_the_bits_of_the_cpu(&format!("round_into {dtype} {range:?}"), |device| {
                let from = up(device, &random(DType::F32, [5000], 1, 1.0));
                let mut to = up(device, &random(dtype, [5000], 2, 1.0));
                ops::round_into(&from, range.clone(), &mut to, at).unwrap();
                vec![to]
            });
        }
    }
}

#[test]
fn sum_of_squares() {
    let Some(device) = device() else { return };
    let host = parameters(1);
    let there: Vec<Tensor> = host.iter().map(|x| up(device, x)).collect();
    let sum = |tensors: &[Tensor]| {
        let sum = ops::sum_of_squares_all(&tensors.iter().collect::<Vec<_>>()).unwrap();
        Tensor::from_slice(&[sum], [1])
    };
    let got = twice("sum_of_squares", || vec![sum(&there)]);
    let n: usize = SIZES.iter().sum();
    // Terms of one sign: the sum, which every rounding is a share of, is as large as their number.
    assert_matches("sum_of_squares", &got[0], &sum(&host), DType::F64, n, n as f64);
    let each = ops::sums_of_squares(&there.iter().collect::<Vec<_>>()).unwrap();
    for (i, (host, there)) in host.iter().zip(&there).enumerate() {
        assert_eq!(sum(std::slice::from_ref(there)).to_f64_vec(), each[i..=i]);
        let (want, got) = (sum(std::slice::from_ref(host)), sum(std::slice::from_ref(there)));
        let n = SIZES[i];
        assert_matches("sum_of_squares of one", &got, &want, DType::F64, n, n as f64);
    }
    // What is no number shows; what is one, though its square is not in F32, does not.
    for (value, is) in [
        (f32::NAN, f64::is_nan as fn(f64) -> bool),
        (f32::NEG_INFINITY, f64::is_infinite),
        (1e30, f64::is_finite),
    ] {
        let mut host = parameters(1);
        host[8].as_mut_slice::<f32>()[16384] = value;
        let there: Vec<Tensor> = host.iter().map(|x| up(device, x)).collect();
        assert!(is(sum(&there).as_slice::<f64>()[0]), "{value}");
    }
}

#[test]
fn zero_all() {
    let Some(device) = device() else { return };
    let mut tensors: Vec<Tensor> = parameters(1).iter().map(|x| up(device, x)).collect();
    ops::zero_all(&mut tensors.iter_mut().collect::<Vec<_>>()).unwrap();
    for tensor in &tensors {
        assert!(down(tensor).bytes().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn parameters_of_several_devices_are_refused() {
    let Some(device) = device() else { return };
    let (host, there) = (random(DType::F32, [3], 1, 1.0), random(DType::F32, [3], 1, 1.0));
    let there = up(device, &there);
    assert!(ops::sum_of_squares_all(&[&there, &host]).is_err());
    assert!(ops::sum_of_squares_all(&[&host, &there]).is_err());
}

#[test]
fn non_finite() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for n in [1, 7, 8, 2047, 2049, 70_000] {
            let mut values = random(dtype, [n], 1, 1.0).to_f64_vec();
            let find = |values: &[f64]| {
                let host = Tensor::from_slice(values, [n]);
                let want = ops::non_finite(&wide(&host.to_dtype(dtype))).unwrap();
                let got = ops::non_finite(&up(device, &host.to_dtype(dtype))).unwrap();
                assert_eq!(got, want, "{dtype} {n}");
                got
            };
            assert_eq!(find(&values), None);
            values[n - 1] = f64::NAN;
            assert_eq!(find(&values), Some((n - 1, 1)));
            values[n / 2] = f64::NEG_INFINITY;
            values[n / 3] = f64::INFINITY;
            assert_eq!(find(&values).map(|(first, _)| first), Some(n / 3));
        }
    }
}
