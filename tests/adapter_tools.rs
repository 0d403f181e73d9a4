//! Is adapter algebra what the dense matrices say? Everything is compared with products made in f64, decomposed densely.

#[path = "common/mod.rs"]
mod common;
#[path = "common/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::assert_close;
use glmtune::adapter::{self, Adapter, Rank};
use glmtune::checkpoint::{AdapterConfig, Patterns, write_adapter, write_torch_bin};
use glmtune::export::peft;
use glmtune::model::tune::Strength;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Tensor};
use nalgebra::DMatrix;
use program::{Workplace, fails, glmtune, str, succeeds, text};
use serde_json::{Value, json};

const HIDDEN: usize = 24;
const INNER: usize = 40;

/// A linear of a small model: its end, rows, columns.
const LINEARS: [(&str, usize, usize); 4] = [
    ("attention.query_key_value", 3 * HIDDEN, HIDDEN),
    ("attention.dense", HIDDEN, HIDDEN),
    ("mlp.dense_h_to_4h", INNER, HIDDEN),
    ("mlp.dense_4h_to_h", HIDDEN, INNER),
];

fn random(shape: [usize; 2], seed: u64) -> Tensor {
    let stream = Stream::new(seed, 3);
    let values: Vec<f32> = (0..(shape[0] * shape[1]) as u64)
        .map(|i| stream.normal(i))
        .collect();
    Tensor::from_slice(&values, shape)
}

fn config(r: usize, alpha: f64, targets: &[&str]) -> AdapterConfig {
    AdapterConfig {
        r,
        lora_alpha: alpha,
        target_modules: targets.iter().map(|t| t.to_string()).collect(),
        ..AdapterConfig::default()
    }
}

/// Random factors for the targets of `config` in two layers, with singular values that fall.
fn tensors(config: &AdapterConfig, seed: u64) -> Vec<(String, Tensor)> {
    let mut tensors = Vec::new();
    for layer in 0..2 {
        for (number, (end, out, input)) in LINEARS.into_iter().enumerate() {
            let module = format!("transformer.layers.{layer}.{end}");
            if !config.targets(&module) {
                continue;
            }
            let r = config.rank(&module);
            let seed = 100 * seed + 10 * layer + number as u64;
            let mut a = random([r, input], seed);
            for (i, row) in a.as_mut_slice::<f32>().chunks_exact_mut(input).enumerate() {
                row.iter_mut().for_each(|x| *x *= 0.4f32.powi(i as i32));
            }
            let name = |part: &str| format!("base_model.model.{module}.{part}");
            tensors.push((name("lora_A.weight"), a));
            tensors.push((name("lora_B.weight"), random([out, r], seed + 5000)));
            if config.use_dora {
                let m: Vec<f32> = (0..out).map(|i| 1.0 + 0.01 * i as f32).collect();
                tensors.push((name("lora_magnitude_vector"), Tensor::from_slice(&m, [out])));
            }
        }
    }
    tensors
}

fn folder(dir: &Path, config: &AdapterConfig, seed: u64) -> PathBuf {
    let tensors = tensors(config, seed);
    let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    let path = dir.join(format!("adapter{seed}"));
    write_adapter(&path, config, &borrowed).unwrap();
    path
}

fn matrix(tensor: &Tensor) -> DMatrix<f64> {
    let (m, n) = tensor.shape().rows_and_columns();
    DMatrix::from_row_iterator(m, n, tensor.to_f64_vec())
}

/// `s B A` of every linear, from the files alone: whatever a folder says in `rank_pattern` it says by whole names here.
fn dense(dir: &Path) -> BTreeMap<String, DMatrix<f64>> {
    let text = std::fs::read(dir.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&text).unwrap();
    let file = common::read_safetensors(&dir.join("adapter_model.safetensors"));
    let mut dense = BTreeMap::new();
    for (name, a) in &file {
        let Some(module) = name.strip_suffix(".lora_A.weight") else {
            continue;
        };
        let b = &file[&format!("{module}.lora_B.weight")];
        let module = module.strip_prefix("base_model.model.").unwrap();
        let of = |pattern: &str, key: &str| {
            let special = config[pattern].get(module).unwrap_or(&config[key]);
            special.as_f64().unwrap()
        };
        let (r, alpha) = (of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha"));
        assert_eq!(r, a.extent(0) as f64, "{module}");
        let scale = match config["use_rslora"] == true {
            true => alpha / r.sqrt(),
            false => alpha / r,
        };
        dense.insert(module.to_string(), matrix(b) * matrix(a) * scale);
    }
    dense
}

#[track_caller]
fn assert_same(
    what: &str,
    got: &BTreeMap<String, DMatrix<f64>>,
    want: &BTreeMap<String, DMatrix<f64>>,
    part: f64,
) {
    assert!(
        got.keys().eq(want.keys()),
        "{what}: {:?} {:?}",
        got.keys(),
        want.keys()
    );
    for (module, want) in want {
        let off = (&got[module] - want).norm();
        assert!(
            off <= part * want.norm(),
            "{what}: {module} is {off:e} off {:e}",
            want.norm()
        );
    }
}

const ALL: [&str; 4] = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"];

#[test]
fn norms_are_those_of_the_product() {
    let dir = tempfile::tempdir().unwrap();
    let config = AdapterConfig {
        use_rslora: true,
        ..config(5, 3.0, &ALL)
    };
    let path = folder(dir.path(), &config, 1);
    let adapter = Adapter::read(&path).unwrap();
    let dense = dense(&path);
    assert_eq!(adapter.updates.len(), 8);
    let order: Vec<&str> = adapter::in_order(&adapter).into_iter().map(|(m, _)| m).collect();
    assert_eq!(order[1], "transformer.layers.0.attention.dense");
    for (module, update) in &adapter.updates {
        let norms = adapter::norms(update).unwrap();
        let spectrum = dense[module].clone().svd(false, false).singular_values;
        let sum: f64 = spectrum.iter().sum();
        let entropy: f64 = spectrum
            .iter()
            .map(|s| s / sum)
            .filter(|p| *p > 1e-15)
            .map(|p| -p * p.ln())
            .sum();
        let got = [norms.frobenius, norms.spectral, norms.effective_rank];
        let want = [dense[module].norm(), spectrum[0], entropy.exp()];
        assert_close(module, &got, &want, 0.0, 1e-11);
        assert!(norms.effective_rank > 1.0 && norms.effective_rank < 5.0);
    }
}

#[test]
fn differences_are_those_of_the_products() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (
        folder(dir.path(), &config(4, 8.0, &ALL), 1),
        folder(dir.path(), &config(2, 3.0, &["query_key_value", "dense"]), 2),
    );
    let (first, second) = (Adapter::read(&a).unwrap(), Adapter::read(&b).unwrap());
    let (x, y) = (dense(&a), dense(&b));
    for module in first.updates.keys() {
        let d = adapter::difference(first.updates.get(module), second.updates.get(module)).unwrap();
        let Some(y) = y.get(module) else {
            assert_close(
                module,
                &[d.first, d.second, d.difference],
                &[x[module].norm(), 0.0, x[module].norm()],
                0.0,
                1e-12,
            );
            assert_eq!(d.cosine, None);
            continue;
        };
        let x = &x[module];
        let want = [
            x.norm(),
            y.norm(),
            (x - y).norm(),
            x.dot(y) / (x.norm() * y.norm()),
        ];
        assert_close(
            module,
            &[d.first, d.second, d.difference, d.cosine.unwrap()],
            &want,
            1e-13,
            1e-11,
        );
    }
    // Nearly equal adapters keep their digits: all but the last bits of one number are the same.
    let mut near = first.clone();
    let update = near.updates.values_mut().next().unwrap();
    let (out, r) = update.b.shape().rows_and_columns();
    let step = f64::from(update.b.as_slice::<f32>()[r - 1]) * f64::from(f32::EPSILON);
    update.b.as_mut_slice::<f32>()[r - 1] *= 1.0 + f32::EPSILON;
    assert!(out > 1);
    let (module, update) = near.updates.iter().next().unwrap();
    let d = adapter::difference(first.updates.get(module), Some(update)).unwrap();
    let row: f64 = update.a.to_f64_vec()[(r - 1) * HIDDEN..]
        .iter()
        .map(|x| x * x)
        .sum();
    let want = (update.scale * step).abs() * row.sqrt();
    assert!((d.difference / want - 1.0).abs() < 0.5, "{} {want}", d.difference);
}

#[test]
fn a_sum_by_factors_is_the_sum_of_the_products() {
    let dir = tempfile::tempdir().unwrap();
    let rslora = AdapterConfig {
        use_rslora: true,
        ..config(5, 7.0, &["query_key_value", "dense_4h_to_h"])
    };
    let paths = [
        folder(dir.path(), &config(3, 6.0, &ALL), 1),
        folder(dir.path(), &rslora, 2),
        folder(dir.path(), &config(2, 4.0, &ALL), 3),
    ];
    let weights = [0.7, -1.5, 1.0];
    let adapters: Vec<Adapter> = paths.iter().map(|path| Adapter::read(path).unwrap()).collect();
    let weighted: Vec<(&Adapter, f64)> = adapters.iter().zip(weights).collect();
    let mut want: BTreeMap<String, DMatrix<f64>> = BTreeMap::new();
    for (path, weight) in paths.iter().zip(weights) {
        for (module, product) in dense(path) {
            let product = product * weight;
            want.entry(module)
                .and_modify(|sum| *sum += &product)
                .or_insert(product);
        }
    }
    let sum = adapter::add(&weighted).unwrap();
    let out = dir.path().join("sum");
    sum.write(&out).unwrap();
    sum.check_written(&out).unwrap();
    assert_same("sum", &dense(&out), &want, 1e-6);
    assert_eq!(
        sum.updates["transformer.layers.0.attention.query_key_value"].rank(),
        10
    );
    assert_eq!(sum.updates["transformer.layers.0.attention.dense"].rank(), 5);
    assert_eq!(sum.config.target_modules, ALL);

    // The same scale everywhere: no number is rounded.
    let twice = adapter::add(&[(&adapters[0], 1.0), (&adapters[2], 1.0)]).unwrap();
    twice.write(&out).unwrap();
    let (one, two) = (dense(&paths[0]), dense(&paths[2]));
    let want: BTreeMap<String, DMatrix<f64>> = one.iter().map(|(m, x)| (m.clone(), x + &two[m])).collect();
    assert_same("same scales", &dense(&out), &want, 1e-14);
    assert_eq!((twice.config.r, twice.config.lora_alpha), (5, 10.0));

    // An adapter less itself is nothing.
    let nothing = adapter::add(&[(&adapters[1], 0.5), (&adapters[1], -0.5)]).unwrap();
    let norms = nothing
        .updates
        .values()
        .map(|u| adapter::norms(u).unwrap().frobenius);
    assert!(adapter::root_of_squares(norms) < 1e-13);

    // Adapters of single layers are named one by one.
    let upper = AdapterConfig {
        layers_to_transform: vec![1],
        ..config(2, 2.0, &["dense"])
    };
    let upper = Adapter::read(&folder(dir.path(), &upper, 4)).unwrap();
    let sum = adapter::add(&[(&upper, 1.0), (&adapters[1], 1.0)]).unwrap();
    sum.write(&out).unwrap();
    let again = Adapter::read(&out).unwrap();
    assert_eq!(again.updates.len(), 1 + 4);
    assert!(
        again
            .config
            .target_modules
            .contains(&"transformer.layers.1.attention.dense".to_string())
    );
    let sum = adapter::add(&[(&upper, 1.0), (&upper, 1.0)]).unwrap();
    assert_eq!(
        (
            sum.config.target_modules.as_slice(),
            sum.config.layers_to_transform.as_slice()
        ),
        (&["dense".to_string()][..], &[1][..])
    );
}

#[test]
fn a_lower_rank_is_the_nearest_one() {
    let dir = tempfile::tempdir().unwrap();
    let patterns = AdapterConfig {
        rank_pattern: Patterns::new([("transformer.layers.1.attention.dense".to_string(), 2)]).unwrap(),
        alpha_pattern: Patterns::new([("transformer.layers.0.attention.dense".to_string(), -9.0)]).unwrap(),
        ..config(6, 12.0, &ALL)
    };
    let rslora = AdapterConfig {
        use_rslora: true,
        ..config(6, 4.0, &ALL)
    };
    for (seed, config) in [(1, config(6, 12.0, &ALL)), (2, rslora), (3, patterns)] {
        let path = folder(dir.path(), &config, seed);
        let adapter = Adapter::read(&path).unwrap();
        let before = dense(&path);
        let out = dir.path().join("resized");
        for rank in [1, 2, 3, 6] {
            let (lower, resized) = adapter::resize(&adapter, Rank::Fixed(rank)).unwrap();
            lower.write(&out).unwrap();
            let after = dense(&out);
            let (mut squares, mut all) = (0.0, 0.0);
            for r in &resized {
                let exact = &before[&r.module];
                let spectrum = exact.clone().svd(false, false).singular_values;
                let kept = rank.min(adapter.updates[&r.module].rank());
                assert_eq!((r.after, lower.updates[&r.module].rank()), (kept, kept));
                // Eckart and Young: what is lost is the rest of the spectrum.
                let tail: f64 = spectrum.iter().skip(kept).map(|s| s * s).sum::<f64>().sqrt();
                let off = (exact - &after[&r.module]).norm();
                let rounding = 2e-7 * exact.norm();
                assert!((off - tail).abs() < rounding, "{}: {off} {tail}", r.module);
                assert!(
                    (r.error - off).abs() < 1e-12 * exact.norm(),
                    "{}: told {}, is {off}",
                    r.module,
                    r.error
                );
                assert!((r.norm / exact.norm() - 1.0).abs() < 1e-12);
                let singular = after[&r.module].clone().svd(false, false).singular_values;
                for (got, want) in singular.iter().zip(spectrum.iter()).take(kept) {
                    assert!(
                        (got - want).abs() < 2e-7 * spectrum[0],
                        "{}: {got} {want}",
                        r.module
                    );
                }
                squares += off * off;
                all += exact.norm_squared();
            }
            let told = adapter::total_error(&resized);
            assert!((told - (squares / all).sqrt()).abs() < 1e-12, "{told}");
            if rank == 6 {
                assert!(told < 2e-7, "full rank is exact to rounding: {told}");
            }
        }
        // The lowest rank with at most this error, and no lower one has it.
        let (lower, resized) = adapter::resize(&adapter, Rank::Error(0.1)).unwrap();
        for r in &resized {
            let spectrum = before[&r.module].clone().svd(false, false).singular_values;
            let tail = |k: usize| spectrum.iter().skip(k).map(|s| s * s).sum::<f64>().sqrt();
            assert!(tail(r.after) <= 0.1 * r.norm && (r.after == 1 || tail(r.after - 1) > 0.1 * r.norm));
        }
        let ranks: std::collections::BTreeSet<usize> = resized.iter().map(|r| r.after).collect();
        lower.write(&out).unwrap();
        let again = Adapter::read(&out).unwrap();
        assert!(
            again
                .updates
                .iter()
                .all(|(m, u)| u.rank() == lower.updates[m].rank())
        );
        assert_eq!(again.config.rank_pattern.is_empty(), ranks.len() == 1);
    }
}

#[test]
fn scaling_moves_alpha_alone() {
    let dir = tempfile::tempdir().unwrap();
    let config = AdapterConfig {
        alpha_pattern: Patterns::new([("transformer.layers.0.attention.dense".to_string(), 3.0)]).unwrap(),
        ..config(4, 8.0, &ALL)
    };
    let path = folder(dir.path(), &config, 1);
    let adapter = Adapter::read(&path).unwrap();
    let out = dir.path().join("scaled");
    for factor in [0.3, -2.0, 0.0] {
        adapter::scale(&adapter, factor).unwrap().write(&out).unwrap();
        let want = dense(&path).into_iter().map(|(m, x)| (m, x * factor)).collect();
        assert_same("scaled", &dense(&out), &want, 1e-14);
        let bytes = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert_eq!(bytes(&out), bytes(&path));
    }
    assert!(adapter::scale(&adapter, f64::NAN).is_err());
}

/// Exports of every kind of folder are classic ones with the same products; both of their files hold them.
#[test]
fn exports_are_classic_and_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let plain = config(4, 10.0, &ALL);
    let rslora = AdapterConfig {
        use_rslora: true,
        ..config(3, 5.0, &ALL)
    };
    let patterns = AdapterConfig {
        rank_pattern: Patterns::new([("transformer.layers.1.attention.dense".to_string(), 2)]).unwrap(),
        alpha_pattern: Patterns::new([("transformer.layers.0.mlp.dense_h_to_4h".to_string(), 9.0)]).unwrap(),
        ..config(5, 10.0, &["dense", "dense_h_to_4h"])
    };
    let folders: Vec<PathBuf> = [(1, &plain), (2, &rslora), (3, &patterns)]
        .map(|(seed, config)| folder(dir.path(), config, seed))
        .to_vec();
    // As scripts of 2023 left it: one `.bin`, named as in memory, in half.
    let old = dir.path().join("old");
    std::fs::create_dir(&old).unwrap();
    let halves: Vec<(String, Tensor)> = tensors(&plain, 1)
        .into_iter()
        .map(|(name, tensor)| {
            (
                name.replace(".weight", ".default.weight"),
                tensor.to_dtype(DType::F16),
            )
        })
        .collect();
    let borrowed: Vec<(String, &Tensor)> = halves.iter().map(|(n, t)| (n.clone(), t)).collect();
    write_torch_bin(&old.join("adapter_model.bin"), &borrowed).unwrap();
    let few = json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": ALL });
    std::fs::write(old.join("adapter_config.json"), few.to_string()).unwrap();

    let classic = [
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "target_modules",
        "task_type",
    ];
    let export = |what: &str, adapters: &[Strength], want: &BTreeMap<String, DMatrix<f64>>, part: f64| {
        let out = dir.path().join("exported");
        let written = peft::write(adapters, Some(Path::new("THUDM/chatglm-6b")), &out).unwrap();
        assert!(
            written.to_string().starts_with("a PEFT adapter of r "),
            "{written}"
        );
        assert_same(what, &dense(&out), want, part);
        let json: Value =
            serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
        let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        assert_eq!(keys, classic);
        assert_eq!(json["base_model_name_or_path"], "THUDM/chatglm-6b");
        let (new, old) = (
            common::read_safetensors(&out.join("adapter_model.safetensors")),
            glmtune::checkpoint::read_tensors(&out.join("adapter_model.bin")).unwrap(),
        );
        assert_eq!(new.len(), old.len());
        assert!(
            new.iter()
                .all(|(name, tensor)| old[name].bytes() == tensor.bytes() && tensor.dtype() == DType::F32)
        );
    };
    let one = |dir| [Strength { dir, factor: 1.0 }];
    export("plain", &one(&folders[0]), &dense(&folders[0]), 0.0);
    export("rsLoRA", &one(&folders[1]), &dense(&folders[1]), 1e-14);
    export("patterns", &one(&folders[2]), &dense(&folders[2]), 1e-6);
    let half = halves.iter().filter_map(|(name, a)| {
        let module = name.strip_suffix(".lora_A.default.weight")?;
        let b = halves
            .iter()
            .find(|(n, _)| *n == format!("{module}.lora_B.default.weight"))
            .unwrap();
        Some((
            module.strip_prefix("base_model.model.")?.to_string(),
            matrix(&b.1) * matrix(a) * 2.5,
        ))
    });
    export("old", &one(&old), &half.collect(), 0.0);
    let scaled = [Strength {
        dir: &folders[0],
        factor: -0.5,
    }];
    let want = dense(&folders[0])
        .into_iter()
        .map(|(m, x)| (m, x * -0.5))
        .collect();
    export("scaled", &scaled, &want, 1e-14);
    let all = folders.iter().zip([1.0, 0.25, 2.0]);
    let all: Vec<Strength> = all.map(|(dir, factor)| Strength { dir, factor }).collect();
    let mut want = dense(&folders[0]);
    for (path, factor) in [(&folders[1], 0.25), (&folders[2], 2.0)] {
        dense(path)
            .into_iter()
            .for_each(|(m, x)| *want.get_mut(&m).unwrap() += x * factor);
    }
    export("several", &all, &want, 1e-6);
}

#[test]
fn what_cannot_be_calculated_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let dora = AdapterConfig {
        use_dora: true,
        ..config(2, 4.0, &ALL)
    };
    let read = |config: &AdapterConfig, seed| Adapter::read(&folder(dir.path(), config, seed)).unwrap();
    let (plain, dora) = (read(&config(2, 4.0, &ALL), 1), read(&dora, 2));
    let message = |adapters: &[(&Adapter, f64)]| adapter::add(adapters).unwrap_err().to_string();
    assert!(message(&[(&plain, 1.0), (&dora, 1.0)]).contains("DoRA"));
    assert!(message(&[(&plain, f64::INFINITY)]).contains("--weights"));
    assert!(message(&[]).contains("at least one"));
    // Magnitudes stay through what only changes directions.
    let (lower, _) = adapter::resize(&dora, Rank::Fixed(1)).unwrap();
    for changed in [&lower, &adapter::scale(&dora, 0.5).unwrap()] {
        let kept = |(m, u): (&String, &adapter::Update)| {
            u.magnitude.as_ref().unwrap().bytes() == dora.updates[m].magnitude.as_ref().unwrap().bytes()
        };
        assert!(changed.updates.iter().all(kept));
        let out = dir.path().join("kept");
        changed.write(&out).unwrap();
        assert!(Adapter::read(&out).unwrap().updates.iter().all(kept));
    }
    for (rank, word) in [
        (Rank::Fixed(0), "--rank"),
        (Rank::Fixed(3), "from 1 to 2"),
        (Rank::Error(1.0), "--error"),
        (Rank::Error(f64::NAN), "--error"),
    ] {
        assert!(
            adapter::resize(&plain, rank)
                .unwrap_err()
                .to_string()
                .contains(word)
        );
    }
    // Whole modules: one adapter may bring one, unweighted.
    let mut whole = plain.clone();
    whole.config.modules_to_save = vec!["final_layernorm".into()];
    let norm = Tensor::from_slice(&[1.5f32; HIDDEN], [HIDDEN]);
    whole
        .saved
        .insert("transformer.final_layernorm.weight".into(), norm);
    assert!(message(&[(&plain, 1.0), (&whole, 0.5)]).contains("final_layernorm.weight"));
    assert!(message(&[(&whole, 1.0), (&whole, 1.0)]).contains("trained whole"));
    let sum = adapter::add(&[(&plain, 0.5), (&whole, 1.0)]).unwrap();
    assert_eq!(
        (sum.saved.len(), sum.config.modules_to_save.as_slice()),
        (1, &["final_layernorm".to_string()][..])
    );
    // Another base.
    let mut other = plain.clone();
    let update = other.updates.values_mut().next().unwrap();
    update.a = random([2, HIDDEN + 1], 9);
    assert!(message(&[(&plain, 1.0), (&other, 1.0)]).contains("different base models"));
}

#[test]
fn the_program_calculates() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (
        folder(dir.path(), &config(4, 8.0, &ALL), 1),
        folder(dir.path(), &config(2, 6.0, &ALL), 2),
    );
    let place = |name: &str| dir.path().join(name);
    let run = |args: &[&str]| glmtune(&[&["adapter"], args].concat()).output().unwrap();
    let (a, b) = (str(&a), str(&b));

    let shown = run(&["inspect", a]);
    succeeds(&shown);
    let page = text(&shown.stdout);
    assert!(
        page.lines().all(|line| line.chars().count() <= 200) && !page.contains('\u{1b}'),
        "{page}"
    );
    let bars = page.lines().filter(|line| line.ends_with('#')).count();
    assert_eq!(bars, 2, "{page}");
    let json: Value = serde_json::from_slice(&run(&["inspect", a, "--json"]).stdout).unwrap();
    let products = dense(Path::new(a));
    for module in json["modules"].as_array().unwrap() {
        let want = products[module["module"].as_str().unwrap()].norm();
        assert!((module["frobenius"].as_f64().unwrap() / want - 1.0).abs() < 1e-11);
    }
    let whole: f64 = products.values().map(DMatrix::norm_squared).sum::<f64>().sqrt();
    assert!((json["frobenius"].as_f64().unwrap() / whole - 1.0).abs() < 1e-11);

    let json: Value = serde_json::from_slice(&run(&["diff", a, b, "--json"]).stdout).unwrap();
    let other = dense(Path::new(b));
    let off: f64 = products
        .iter()
        .map(|(m, x)| (x - &other[m]).norm_squared())
        .sum::<f64>()
        .sqrt();
    let inner: f64 = products.iter().map(|(m, x)| x.dot(&other[m])).sum();
    let second: f64 = other.values().map(DMatrix::norm_squared).sum::<f64>().sqrt();
    let got = [
        json["all"]["difference"].as_f64().unwrap(),
        json["all"]["cosine"].as_f64().unwrap(),
    ];
    assert_close("diff", &got, &[off, inner / (whole * second)], 1e-13, 1e-11);
    succeeds(&run(&["diff", a, b]));

    let sum = place("sum");
    succeeds(&run(&["add", a, b, "--weights", "0.5,-1", "--output", str(&sum)]));
    let want = products
        .iter()
        .map(|(m, x)| (m.clone(), x * 0.5 - &other[m]))
        .collect();
    assert_same("add", &dense(&sum), &want, 1e-6);
    let low = place("low");
    let said = run(&["add", a, b, "--method", "svd", "--output", str(&low)]);
    succeeds(&said);
    assert_eq!(Adapter::read(&low).unwrap().config.r, 4);
    assert!(text(&said.stdout).contains("6 -> 4"), "{}", text(&said.stdout));
    let said = run(&[
        "resize",
        a,
        "--rank",
        "2",
        "--output",
        str(&low),
        "--overwrite",
        "--json",
    ]);
    succeeds(&said);
    let json: Value = serde_json::from_slice(&said.stdout).unwrap();
    let off: f64 = dense(&low)
        .iter()
        .map(|(m, x)| (x - &products[m]).norm_squared())
        .sum::<f64>()
        .sqrt();
    assert!((json["relative"].as_f64().unwrap() - off / whole).abs() < 1e-9);
    let scaled = place("scaled");
    succeeds(&run(&["scale", a, "--factor", "-0.5", "--output", str(&scaled)]));
    assert_same(
        "scale",
        &dense(&scaled),
        &products.iter().map(|(m, x)| (m.clone(), x * -0.5)).collect(),
        1e-14,
    );

    // One line each, and nothing is touched.
    let before = std::fs::read(scaled.join("adapter_config.json")).unwrap();
    for (args, code, words) in [
        (
            vec!["scale", a, "--factor", "2", "--output", str(&scaled)],
            1,
            vec!["scaled", "--overwrite"],
        ),
        (
            vec!["scale", a, "--factor", "2", "--output", a, "--overwrite"],
            1,
            vec!["the input"],
        ),
        (
            vec![
                "scale",
                a,
                "--factor",
                "2",
                "--output",
                str(dir.path()),
                "--overwrite",
            ],
            1,
            vec!["the input"],
        ),
        (
            vec!["scale", a, "--factor", "nan", "--output", "x"],
            1,
            vec!["--factor"],
        ),
        (
            vec!["add", a, b, "--weights", "1", "--output", "x"],
            2,
            vec!["--weights", "one for each"],
        ),
        (
            vec!["add", a, b, "--rank", "2", "--output", "x"],
            2,
            vec!["--method svd"],
        ),
        (
            vec!["resize", a, "--rank", "5", "--output", "x"],
            1,
            vec!["--rank", "from 1 to 4"],
        ),
        (vec!["inspect", "nowhere"], 1, vec!["nowhere"]),
        (vec!["inspect", str(dir.path())], 1, vec!["adapter_config.json"]),
    ] {
        let line = fails(&run(&args), code);
        assert!(words.iter().all(|word| line.contains(word)), "{args:?}: {line}");
    }
    assert_eq!(std::fs::read(scaled.join("adapter_config.json")).unwrap(), before);
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        left.iter().all(|name| !name.to_string_lossy().starts_with('.')),
        "{left:?}"
    );
    // A folder that holds more than an adapter is not removed.
    std::fs::write(scaled.join("run.toml"), "").unwrap();
    let line = fails(
        &run(&[
            "scale",
            a,
            "--factor",
            "2",
            "--output",
            str(&scaled),
            "--overwrite",
        ]),
        1,
    );
    assert!(line.contains("run.toml"), "{line}");
}

/// What a reader does not heed it says, once.
#[test]
fn what_is_not_heeded_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let plain = config(2, 4.0, &ALL);
    let path = folder(dir.path(), &plain, 1);
    let inspect = || glmtune(&["adapter", "inspect", str(&path)]).output().unwrap();
    assert_eq!(succeeds(&inspect()), "");
    let file = path.join("adapter_config.json");
    let sound: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let mut newer = sound.clone();
    for (key, value) in [
        ("shiny", json!(3)),
        ("empty", json!({})),
        ("off", json!(false)),
        ("peft_version", json!("0.21.2")),
    ] {
        newer[key] = value;
    }
    std::fs::write(&file, newer.to_string()).unwrap();
    let said = succeeds(&inspect());
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.contains("shiny 3") && !said.contains("empty") && !said.contains("off"),
        "{said}"
    );
    std::fs::write(&file, sound.to_string()).unwrap();
    let tensors = tensors(&plain, 1);
    let mut borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    for (spoil, word) in [(false, "holds the same"), (true, "has other numbers")] {
        if spoil {
            borrowed[0].1 = &tensors[0].1;
            let other = random([2, HIDDEN], 77);
            let mut spoilt = borrowed.clone();
            spoilt[0].1 = &other;
            write_torch_bin(&path.join("adapter_model.bin"), &spoilt).unwrap();
        } else {
            write_torch_bin(&path.join("adapter_model.bin"), &borrowed).unwrap();
        }
        let said = succeeds(&inspect());
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.contains("adapter_model.safetensors is used") && said.contains(word),
            "{said}"
        );
    }
}

/// With a base, changes are those of its weights: of DoRA too, whose new rows have the lengths that its magnitudes say.
#[test]
fn changes_are_told_against_the_base() {
    let Some(base) = common::golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let checkpoint = glmtune::checkpoint::Checkpoint::open(&base).unwrap();
    for case in ["dora_all", "saved_norms"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/goldens/peft")
            .join(case)
            .join("final_adapter");
        let args = ["adapter", "inspect", str(&path), "--model", str(&base), "--json"];
        let shown = glmtune(&args).output().unwrap();
        succeeds(&shown);
        let json: Value = serde_json::from_slice(&shown.stdout).unwrap();
        let file = common::read_safetensors(&path.join("adapter_model.safetensors"));
        let products = dense(&path);
        assert_eq!(json["modules"].as_array().unwrap().len(), products.len());
        for told in json["modules"].as_array().unwrap() {
            let module = told["module"].as_str().unwrap();
            let w = matrix(&checkpoint.tensor(&format!("{module}.weight")).unwrap());
            let mut new = &w + &products[module];
            if let Some(m) = file.get(&format!("base_model.model.{module}.lora_magnitude_vector")) {
                for (mut row, m) in new.row_iter_mut().zip(m.to_f64_vec()) {
                    let length = row.norm();
                    row *= m / length;
                }
            }
            let got = [
                told["weight"].as_f64().unwrap(),
                told["change"].as_f64().unwrap(),
                told["relative"].as_f64().unwrap(),
            ];
            let change = (&new - &w).norm();
            // The new weight of DoRA is rounded to F32.
            assert_close(module, &got, &[w.norm(), change, change / w.norm()], 0.0, 2e-5);
        }
        for told in json["modules_to_save"].as_array().unwrap() {
            let name = told["name"].as_str().unwrap();
            let (new, old) = (
                &file[&format!("base_model.model.{name}")],
                checkpoint.tensor(name).unwrap(),
            );
            let off: f64 = new
                .to_f64_vec()
                .iter()
                .zip(old.to_f64_vec())
                .map(|(a, b)| (a - b) * (a - b))
                .sum();
            assert_close(
                name,
                &[told["distance"].as_f64().unwrap()],
                &[off.sqrt()],
                0.0,
                1e-9,
            );
        }
        assert_eq!(
            json["modules_to_save"].as_array().unwrap().is_empty(),
            case == "dora_all"
        );
        succeeds(&glmtune(&args[..args.len() - 1]).output().unwrap());
    }
    let dir = tempfile::tempdir().unwrap();
    let other = folder(dir.path(), &config(2, 4.0, &ALL), 1);
    let line = fails(
        &glmtune(&["adapter", "inspect", str(&other), "--model", str(&base)])
            .output()
            .unwrap(),
        1,
    );
    assert!(line.contains("another base model"), "{line}");
}

/// A run can adapt single layers with ranks and alphas of their own, and another can go on from it.
#[test]
fn a_run_of_patterns_is_gone_on_from() {
    let Some(place) = Workplace::new() else { return };
    let patterns = [
        "--lora-layers",
        "1",
        "--lora-rank-pattern",
        "mlp.dense_4h_to_h=2",
        "--lora-alpha-pattern",
        "attention\\..*=3",
        "--method",
        "lora",
        "--max-steps",
        "4",
    ];
    succeeds(&place.train("first", &patterns).output().unwrap());
    let first = place.path("first");
    let read = |dir: &Path| Adapter::read(dir).unwrap();
    let kinds = |adapter: &Adapter| -> Vec<(String, usize, f64)> {
        let updates = adapter::in_order(adapter).into_iter();
        updates.map(|(m, u)| (m.to_string(), u.rank(), u.scale)).collect()
    };
    let module = |end: &str| format!("transformer.layers.1.{end}");
    let want = [
        (module("attention.query_key_value"), 4, 0.75),
        (module("attention.dense"), 4, 0.75),
        (module("mlp.dense_h_to_4h"), 4, 2.0),
        (module("mlp.dense_4h_to_h"), 2, 4.0),
    ];
    assert_eq!(kinds(&read(&first)), want);
    let args = [
        "train",
        "--model",
        str(&place.model()),
        "--data",
        str(&place.data()),
        "--method",
        "lora",
        "--max-steps",
        "2",
    ]
    .map(String::from);
    let mut again = glmtune(&args.each_ref().map(String::as_str));
    again.args([
        "--adapter",
        str(&first),
        "--output",
        str(&place.path("second")),
        "--val-size",
        "2",
    ]);
    succeeds(&again.output().unwrap());
    assert_eq!(kinds(&read(&place.path("second"))), want);
    let toml = std::fs::read_to_string(place.path("second/run.toml")).unwrap();
    assert!(
        toml.contains("lora_layers = [1]") && toml.contains("mlp.dense_4h_to_h=2"),
        "{toml}"
    );
    for (flags, word) in [
        (["--lora-rank-pattern", "dense"], "PATTERN=VALUE"),
        (["--lora-rank-pattern", "(=2"], "regular expression"),
        (["--lora-rank-pattern", "dense=0"], "--lora-r"),
        (["--lora-layers", "99"], "--lora-layers"),
    ] {
        let mut args = vec!["--method", "lora", "--max-steps", "1"];
        args.extend(flags);
        let output = place.train("wrong", &args).output().unwrap();
        let line = text(&output.stderr)
            .lines()
            .last()
            .unwrap_or_default()
            .to_string();
        assert!(
            !output.status.success() && line.starts_with("error: ") && line.contains(word),
            "{flags:?}: {line}"
        );
    }
}
