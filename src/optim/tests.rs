use super::*;
use crate::ops;
use crate::tensor::{DType, Shape, Tensor};

fn param(value: &[f32], grad: &[f32]) -> Param {
    let mut param = Param::trainable(Tensor::from_slice(value, [value.len()])).unwrap();
    param.grad.as_mut().unwrap().write(grad).unwrap();
    param
}

fn of_one(config: OptimizerConfig, param: &Param) -> Optimizer {
    Optimizer::new(config, &StateStorage::default(), |visit| visit("w", param)).unwrap()
}

/// Walks `steps` steps down `(p - 1)^2 / 2` from 3 and -1 with gradients that are halved by clipping, and holds the result
/// against `formula(p, g, t)`, the same rule in f64 written from its reference.
#[track_caller]
fn walks_the_path_of(
    config: OptimizerConfig,
    steps: u64,
    formula: &mut dyn FnMut(usize, f64, f64, u64) -> f64,
) {
    const RATE: f64 = 0.05;
    let mut p = param(&[3.0, -1.0], &[0.0, 0.0]);
    let mut optimizer = of_one(config, &p);
    let mut want = [3.0, -1.0];
    for t in 1..=steps {
        let gradient: Vec<f32> = p.value.as_slice::<f32>().iter().map(|p| p - 1.0).collect();
        let grad = p.grad.as_mut().unwrap();
        grad.as_mut_slice::<f32>().copy_from_slice(&gradient);
        optimizer.step(RATE, 0.5, |visit| visit("w", &mut p)).unwrap();
        for (i, want) in want.iter_mut().enumerate() {
            *want = formula(i, *want, 0.5 * (*want - 1.0), t);
        }
    }
    assert_eq!(optimizer.steps(), steps);
    for (got, want) in p.value.to_f64_vec().into_iter().zip(want) {
        assert!((got - want).abs() < 2e-5, "{got} {want}");
    }
}

#[test]
fn adamw_walks_the_path_of_the_formula() {
    let config = OptimizerConfig {
        weight_decay: 0.1,
        ..OptimizerConfig::default()
    };
    let (mut m, mut v) = ([0.0; 2], [0.0; 2]);
    walks_the_path_of(config, 200, &mut |i, p, g, t| {
        m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g;
        v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g * g;
        let mh = m[i] / (1.0 - config.beta1.powi(t as i32));
        let vh: f64 = v[i] / (1.0 - config.beta2.powi(t as i32));
        p * (1.0 - 0.05 * 0.1) - 0.05 * mh / (vh.sqrt() + config.epsilon)
    });
}

#[test]
fn sgd_walks_the_path_of_the_formula() {
    for momentum in [0.0, 0.9] {
        let config = OptimizerConfig {
            momentum,
            weight_decay: 0.1,
            ..OptimizerConfig::of(OptimizerKind::Sgd)
        };
        let mut m = [0.0; 2];
        walks_the_path_of(config, 200, &mut |i, p, g, _| {
            m[i] = momentum * m[i] + g + 0.1 * p;
            p - 0.05 * m[i]
        });
    }
}

#[test]
fn lion_walks_the_path_of_the_formula() {
    let config = OptimizerConfig {
        weight_decay: 0.1,
        ..OptimizerConfig::of(OptimizerKind::Lion)
    };
    assert_eq!((config.beta1, config.beta2), (0.9, 0.99));
    let mut m = [0.0; 2];
    // A sign is all or nothing: where rounding may decide it, which is near the end of the way, the paths would part.
    walks_the_path_of(config, 30, &mut |i, p, g, _| {
        let sign = f64::signum(0.9 * m[i] + 0.1 * g);
        m[i] = 0.99 * m[i] + 0.01 * g;
        p * (1.0 - 0.05 * 0.1) - 0.05 * sign
    });
}

#[test]
fn lion_stands_still_where_there_is_no_gradient() {
    let mut p = param(&[3.0], &[0.0]);
    let mut optimizer = of_one(OptimizerConfig::of(OptimizerKind::Lion), &p);
    optimizer.step(0.1, 1.0, |visit| visit("w", &mut p)).unwrap();
    assert_eq!(p.value.as_slice::<f32>(), [3.0]);
}

/// Normal numbers.
fn normal(n: usize, seed: u64) -> Vec<f32> {
    let stream = crate::rng::Stream::new(seed, 0);
    (0..n as u64).map(|i| stream.normal(i)).collect()
}

/// Three parameters around what 8 bits are for: a large weight, a small one, a bias.
fn parameters() -> Vec<(String, Param)> {
    [("a.lora_A.weight", 5000), ("a.lora_B.weight", 100), ("a.bias", 7)]
        .iter()
        .map(|&(name, n)| (name.to_string(), param(&normal(n, n as u64), &vec![0.0; n])))
        .collect()
}

/// Steps of `optimizer` with gradients that depend on the step and the parameter only.
fn run(optimizer: &mut Optimizer, params: &mut [(String, Param)], steps: std::ops::Range<u64>) {
    for t in steps {
        for (i, (_, p)) in params.iter_mut().enumerate() {
            let gradients = normal(p.value.elements(), 100 * t + i as u64);
            p.grad.as_mut().unwrap().write(&gradients).unwrap();
        }
        optimizer
            .step(0.01, 0.5, |visit| {
                params.iter_mut().try_for_each(|(name, p)| visit(name, p))
            })
            .unwrap();
    }
}

fn registered(config: OptimizerConfig, params: &[(String, Param)]) -> Optimizer {
    Optimizer::new(config, &StateStorage::default(), |visit| {
        params.iter().try_for_each(|(name, param)| visit(name, param))
    })
    .unwrap()
}

fn every_kind() -> Vec<OptimizerConfig> {
    let mut configs: Vec<_> = OptimizerKind::ALL.into_iter().map(OptimizerConfig::of).collect();
    configs.push(OptimizerConfig {
        momentum: 0.9,
        ..OptimizerConfig::of(OptimizerKind::Sgd)
    });
    configs
}

#[test]
fn names_are_those_of_the_configuration() {
    for kind in OptimizerKind::ALL {
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        assert_eq!(
            serde_json::from_value::<OptimizerKind>(kind.name().into()).unwrap(),
            kind
        );
    }
}

#[test]
fn every_state_goes_on_from_disk_as_if_it_had_not_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.safetensors");
    for config in every_kind() {
        let what = format!("{config:?}");
        let mut straight = parameters();
        let mut optimizer = registered(config, &straight);
        run(&mut optimizer, &mut straight, 0..3);
        optimizer.save(&path).unwrap();
        let mut resumed = straight.clone();
        run(&mut optimizer, &mut straight, 3..6);

        let mut again = registered(config, &resumed);
        again.load(&path).unwrap();
        assert_eq!(again.steps(), 3, "{what}");
        run(&mut again, &mut resumed, 3..6);
        for ((name, a), (_, b)) in straight.iter().zip(&resumed) {
            assert_eq!(a.value.bytes(), b.value.bytes(), "{what}: {name}");
        }
    }
}

#[test]
fn a_state_is_as_large_as_the_table_says() {
    let params = parameters();
    let elements = 5000 + 100 + 7;
    let bytes: Vec<usize> = every_kind()
        .into_iter()
        .map(|config| registered(config, &params).state_bytes())
        .collect();
    // Two codes an element, two scales for each of 20 blocks; the small tensors stay in f32.
    let eight = 2 * 5000 + 2 * 4 * 20 + 8 * 107;
    assert_eq!(bytes, [8 * elements, eight, 0, 4 * elements, 4 * elements]);
}

#[test]
fn the_state_of_embeddings_stays_in_32_bits() {
    let large = |name: &str| {
        let param = param(&[0.0; 4096], &[0.0; 4096]);
        registered(
            OptimizerConfig::of(OptimizerKind::Adamw8bit),
            &[(name.to_string(), param)],
        )
        .state_bytes()
    };
    assert_eq!(large("transformer.word_embeddings.weight"), 8 * 4096);
    assert_eq!(large("transformer.prefix_encoder.embedding.weight"), 8 * 4096);
    assert_eq!(
        large("transformer.prefix_encoder.trans.0.weight"),
        2 * 4096 + 8 * 16
    );
}

#[test]
fn the_state_of_another_optimizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.safetensors");
    let params = parameters();
    for saved in OptimizerKind::ALL {
        let optimizer = registered(OptimizerConfig::of(saved), &params);
        optimizer.save(&path).unwrap();
        for wanted in OptimizerKind::ALL {
            let loaded = registered(OptimizerConfig::of(wanted), &params).load(&path);
            assert_eq!(loaded.is_ok(), saved == wanted);
            if let Err(error) = loaded {
                let text = error.to_string();
                assert!(text.contains(&format!("optimizer {}", saved.name())), "{text}");
                assert!(text.contains(&format!("that of {}", wanted.name())), "{text}");
            }
        }
    }
    // Momentum is part of the state.
    let momentum = |momentum| OptimizerConfig {
        momentum,
        ..OptimizerConfig::of(OptimizerKind::Sgd)
    };
    for (saved, wanted) in [(0.0, 0.9), (0.9, 0.0)] {
        registered(momentum(saved), &params).save(&path).unwrap();
        let error = registered(momentum(wanted), &params).load(&path).unwrap_err();
        assert!(error.to_string().contains("momentum_buffer"), "{error}");
    }
}

/// Saves the state of `kind` with one element of `name` made `bad`; loading it must fail, name the tensor and change
/// nothing.
#[track_caller]
fn refuses(kind: OptimizerKind, name: &str, bad: f32) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.safetensors");
    let mut params = parameters();
    let mut optimizer = registered(OptimizerConfig::of(kind), &params);
    run(&mut optimizer, &mut params, 0..2);
    optimizer.save(&path).unwrap();
    let mut tensors = crate::checkpoint::read_tensors(&path).unwrap();
    let metadata = crate::checkpoint::read_metadata(&path).unwrap();
    let tensor = tensors.get_mut(name).unwrap();
    let mut owned = Tensor::zeros(tensor.dtype(), tensor.shape());
    owned.copy_from(tensor).unwrap();
    *owned.as_mut_slice::<f32>().last_mut().unwrap() = bad;
    *tensor = owned;
    let all: Vec<(String, &Tensor)> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
    let damaged = dir.path().join("damaged.safetensors");
    crate::checkpoint::write_safetensors(&damaged, &all, &metadata).unwrap();

    let mut fresh = registered(OptimizerConfig::of(kind), &params);
    let error = fresh.load(&damaged).unwrap_err().to_string();
    assert!(error.contains(name), "{error}");
    assert_eq!(fresh.steps(), 0);
    fresh.save(&path).unwrap();
    let mut untouched = crate::checkpoint::read_tensors(&path).unwrap();
    untouched.remove("step");
    assert!(
        untouched
            .values()
            .all(|t| t.bytes().iter().all(|&byte| byte == 0))
    );
}

#[test]
fn numbers_that_no_optimizer_writes_are_refused() {
    for bad in [f32::NAN, f32::INFINITY] {
        refuses(OptimizerKind::Adamw, "exp_avg.a.bias", bad);
        refuses(OptimizerKind::Adamw8bit, "absmax1.a.lora_A.weight", bad);
        refuses(OptimizerKind::Adamw8bit, "exp_avg_sq.a.bias", bad);
        refuses(OptimizerKind::Lion, "exp_avg.a.lora_B.weight", bad);
    }
    refuses(OptimizerKind::Adamw, "exp_avg_sq.a.lora_A.weight", -1e-9);
    refuses(OptimizerKind::Adamw8bit, "absmax1.a.lora_A.weight", -1e-9);
    refuses(OptimizerKind::Adamw8bit, "absmax2.a.lora_A.weight", -1e-9);
}

#[test]
fn loraplus_raises_b_and_what_has_one_dimension() {
    let layer = "base_model.model.transformer.layers.0.attention.query_key_value";
    let raised = |name: &str, shape: &[usize]| is_raised_by_loraplus(name, Shape::new(shape));
    assert!(raised(&format!("{layer}.lora_B.weight"), &[12, 2]));
    assert!(raised(&format!("{layer}.lora_magnitude_vector"), &[12]));
    assert!(raised("transformer.final_layernorm.weight", &[4]));
    assert!(!raised(&format!("{layer}.lora_A.weight"), &[2, 4]));
    assert!(!raised("transformer.word_embeddings.weight", &[9, 4]));

    // With Lion a step is the rate itself.
    let config = OptimizerConfig {
        loraplus_lr_ratio: Some(16.0),
        ..OptimizerConfig::of(OptimizerKind::Lion)
    };
    let matrix = |value| Param::trainable(Tensor::from_slice(&[value], [1, 1])).unwrap();
    let mut params = [
        ("a.lora_A.weight".to_string(), matrix(0f32)),
        ("a.lora_B.weight".to_string(), matrix(0f32)),
    ];
    let mut optimizer = registered(config, &params);
    for (_, p) in &mut params {
        p.grad.as_mut().unwrap().write(&[1f32]).unwrap();
    }
    optimizer
        .step(0.25, 1.0, |visit| {
            params.iter_mut().try_for_each(|(name, p)| visit(name, p))
        })
        .unwrap();
    let values = params.each_ref().map(|(_, p)| p.value.as_slice::<f32>()[0]);
    assert_eq!(values, [-0.25, -4.0]);
}

#[test]
fn the_rate_of_loraplus_is_that_of_a_run_with_that_rate() {
    for config in every_kind() {
        let config = OptimizerConfig {
            weight_decay: 0.1,
            ..config
        };
        let plus = OptimizerConfig {
            loraplus_lr_ratio: Some(4.0),
            ..config
        };
        let step = |config, rate| {
            let mut b = [(
                "x.lora_B.weight".to_string(),
                param(&normal(5000, 1), &normal(5000, 2)),
            )];
            let mut optimizer = registered(config, &b);
            let [(name, b)] = &mut b;
            optimizer.step(rate, 1.0, |visit| visit(name, b)).unwrap();
            b.value.bytes().to_vec()
        };
        assert_eq!(step(plus, 0.01), step(config, 0.04), "{config:?}");
    }
}

#[test]
fn gradients_are_summed_apart_and_named_by_group() {
    for (name, group) in [
        ("transformer.layers.3.mlp.dense_h_to_4h.weight", "layers.3"),
        (
            "base_model.model.transformer.layers.27.mlp.dense_h_to_4h.lora_A.weight",
            "layers.27",
        ),
        ("transformer.word_embeddings.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("transformer.prefix_encoder.trans.2.weight", "prefix"),
        ("transformer.final_layernorm.bias", "final_layernorm"),
        ("something.else", "other"),
    ] {
        assert_eq!(group_of(name), group, "{name}");
    }
    let tensors = [[3.0f32, 0.0], [0.0, 4.0], [12.0, 0.0]].map(|x| Tensor::from_slice(&x, [2]));
    let all: Vec<&Tensor> = tensors.iter().collect();
    assert_eq!(ops::sums_of_squares(&all).unwrap(), [9.0, 16.0, 144.0]);
    // What is no number shows where it is, and only there.
    let nan = Tensor::from_slice(&[f32::NAN], [1]);
    let sums = ops::sums_of_squares(&[all[0], &nan]).unwrap();
    assert!(sums[0] == 9.0 && sums[1].is_nan(), "{sums:?}");
    assert!(ops::sums_of_squares(&[]).unwrap().is_empty());
}

#[test]
fn large_parameters_update_as_small_ones_and_their_norm_does_not_depend_on_the_threads() {
    let n = 100_003;
    let stream = crate::rng::Stream::new(3, 0);
    let values: Vec<f32> = (0..n).map(|i| stream.normal(i)).collect();
    let gradients: Vec<f32> = (0..n).map(|i| stream.normal(i + n)).collect();
    let mut whole = param(&values, &gradients);
    let mut optimizer = of_one(OptimizerConfig::default(), &whole);
    optimizer.step(0.01, 0.5, |visit| visit("w", &mut whole)).unwrap();
    for i in [0usize, 32_767, 32_768, 100_002] {
        let mut one = param(&values[i..=i], &gradients[i..=i]);
        let mut optimizer = of_one(OptimizerConfig::default(), &one);
        optimizer.step(0.01, 0.5, |visit| visit("w", &mut one)).unwrap();
        assert_eq!(
            one.value.as_slice::<f32>()[0],
            whole.value.as_slice::<f32>()[i],
            "element {i}"
        );
    }
    let norm = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let gradients = [whole.grad.as_ref().unwrap()];
        pool.install(|| ops::sum_of_squares_all(&gradients).unwrap().sqrt())
    };
    let exact = gradients
        .iter()
        .map(|&g| f64::from(g).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!((norm(1) - exact).abs() < 1e-9 * exact);
    assert_eq!(norm(1).to_bits(), norm(3).to_bits());
}

#[test]
fn biases_and_layer_norms_are_not_decayed_but_lora_is() {
    assert!(!is_decayed("transformer.layers.0.input_layernorm.weight"));
    assert!(!is_decayed("transformer.layers.0.post_attention_layernorm.bias"));
    assert!(!is_decayed("transformer.final_layernorm.weight"));
    assert!(!is_decayed("transformer.layers.0.attention.query_key_value.bias"));
    assert!(is_decayed(
        "transformer.layers.0.attention.query_key_value.weight"
    ));
    assert!(is_decayed(
        "base_model.model.transformer.layers.0.mlp.dense_h_to_4h.lora_A.weight"
    ));
    let config = OptimizerConfig {
        weight_decay: 0.5,
        ..OptimizerConfig::default()
    };
    let (mut weight, mut bias) = (param(&[1.0], &[0.0]), param(&[1.0], &[0.0]));
    let mut optimizer = Optimizer::new(config, &StateStorage::default(), |visit| {
        visit("a.weight", &weight)?;
        visit("a.bias", &bias)
    })
    .unwrap();
    optimizer
        .step(0.5, 1.0, |visit| {
            visit("a.weight", &mut weight)?;
            visit("a.bias", &mut bias)
        })
        .unwrap();
    assert_eq!(weight.value.as_slice::<f32>(), [0.75]);
    assert_eq!(bias.value.as_slice::<f32>(), [1.0]);
}

#[test]
fn clipping_is_that_of_torch() {
    assert_eq!(clip_factor(0.5, 1.0), 1.0);
    assert_eq!(clip_factor(2.0, 1.0), 1.0 / (2.0 + 1e-6));
}

#[test]
fn every_parameter_takes_a_step_once() {
    let mut frozen = Param::frozen(Tensor::zeros(DType::F32, [3]));
    let mut params = parameters();
    let mut optimizer = registered(OptimizerConfig::default(), &params);
    let before: Vec<Vec<u8>> = params.iter().map(|(_, p)| p.value.bytes().to_vec()).collect();
    for (_, param) in &mut params {
        let ones = vec![1f32; param.value.elements()];
        param.grad.as_mut().unwrap().write(&ones).unwrap();
    }
    let [(a_name, a), (b_name, b), (c_name, c)] = &mut params[..] else {
        panic!("three parameters");
    };
    // Twice, too few, an unknown one, and one whose gradient is lent to nobody: nothing is updated.
    let mut twice = a.clone();
    let wrong = optimizer.step(0.1, 1.0, |visit| {
        visit(a_name, a)?;
        visit(a_name, &mut twice)?;
        visit(b_name, b)
    });
    assert!(wrong.is_err());
    let wrong = optimizer.step(0.1, 1.0, |visit| {
        visit(a_name, a)?;
        visit(b_name, b)
    });
    let error = wrong.unwrap_err().to_string();
    assert!(error.contains("the end before a.bias"), "{error}");
    assert!(optimizer.update(0.1, 1.0, |visit| visit("d", c)).is_err());
    let mut poor = Param::borrowing(c.value.clone());
    assert!(
        optimizer
            .update(0.1, 1.0, |visit| visit(c_name, &mut poor))
            .is_err()
    );
    assert!(
        [&*a, &*b, &*c]
            .iter()
            .zip(&before)
            .all(|(p, b)| p.value.bytes() == b)
    );
    assert_eq!(optimizer.steps(), 0);
    // In parts, in any order, what does not train passed over.
    optimizer.update(0.1, 1.0, |visit| visit(c_name, c)).unwrap();
    assert!(optimizer.update(0.1, 1.0, |visit| visit(c_name, c)).is_err());
    optimizer
        .update(0.1, 1.0, |visit| {
            visit(a_name, a)?;
            visit("frozen", &mut frozen)?;
            visit(b_name, b)
        })
        .unwrap();
    optimizer.end().unwrap();
    assert_eq!(optimizer.steps(), 1);
    assert!(
        [&*a, &*b, &*c]
            .iter()
            .zip(&before)
            .all(|(p, b)| p.value.bytes() != b)
    );
    optimizer.update(0.1, 1.0, |visit| visit(b_name, b)).unwrap();
    assert!(optimizer.end().is_err(), "two of three are missing");
    assert_eq!(optimizer.steps(), 1);
}
