use std::fs::File;
use std::time::{Duration, SystemTime};

use super::*;
use crate::checkpoint::write_safetensors;
use crate::model::config::ModelConfig;
use crate::rng::Stream;
use crate::tensor::Tensor;

/// A model folder of two tiny layers; `poison` sets one weight.
fn model(dir: &Path, poison: Option<(&str, f32)>) {
    fs::create_dir_all(dir).unwrap();
    let config = ModelConfig {
        vocab_size: 40,
        hidden_size: 16,
        inner_hidden_size: 24,
        num_layers: 2,
        num_attention_heads: 2,
        bos_token_id: 34,
        eos_token_id: 35,
        mask_token_id: 30,
        gmask_token_id: 31,
        ..ModelConfig::chatglm_6b()
    };
    config.write(dir).unwrap();
    fs::write(dir.join("ice_text.model"), "pieces").unwrap();
    let tensors: Vec<(String, Tensor)> = config
        .tensors()
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            // The head is the embedding.
            let stream = Stream::new(3, if name == LM_HEAD { 0 } else { i as u64 });
            let mut values: Vec<f32> = (0..shape.elements() as u64).map(|j| stream.normal(j)).collect();
            if let Some((_, value)) = poison.filter(|(poisoned, _)| *poisoned == name) {
                values[5] = value;
            }
            (name, Tensor::from_slice(&values, shape).to_dtype(DType::F16))
        })
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor))
        .collect();
    write_safetensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

fn open(dir: &Path) -> (Checkpoint, CacheStatus) {
    open_or_quantize(dir, None, QuantType::Nf4, true, &mut |_, _, _| Ok(())).unwrap()
}

fn touch(path: &Path, time: SystemTime) {
    File::options()
        .append(true)
        .open(path)
        .unwrap()
        .set_modified(time)
        .unwrap();
}

#[test]
fn a_cache_is_a_model_folder_and_is_reused() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    model(&dir, None);
    let (checkpoint, status) = open(&dir);
    assert_eq!(status, CacheStatus::Created);
    checkpoint.validate().unwrap();
    assert_eq!(checkpoint.dir(), dir.join("nf4-cache"));
    assert!(!checkpoint.contains(LM_HEAD) && checkpoint.config().tie_word_embeddings);
    assert_eq!(fs::read(dir.join("nf4-cache/ice_text.model")).unwrap(), b"pieces");

    let source = Checkpoint::open(&dir).unwrap();
    for (name, _) in source.config().tensors() {
        let (want, got) = (source.tensor(&name).unwrap(), checkpoint.tensor(&name));
        if is_quantized_linear(&name) {
            let got = QuantTensor::from_bnb(&name, |key| checkpoint.tensor(key)).unwrap();
            let want = QuantTensor::quantize(&want, QuantType::Nf4, true).unwrap();
            assert_eq!(got.dequantize().bytes(), want.dequantize().bytes(), "{name}");
        } else if name != LM_HEAD {
            assert_eq!(got.unwrap().bytes(), want.bytes(), "{name}");
        }
    }
    assert_eq!(open(&dir).1, CacheStatus::Reused);
    assert_eq!(open(&dir.join("nf4-cache")).1, CacheStatus::AlreadyQuantized);
    let flat = open_or_quantize(&dir, None, QuantType::Fp4, false, &mut |_, _, _| Ok(())).unwrap();
    assert_eq!(
        (flat.0.dir(), flat.1),
        (dir.join("fp4-cache-flat").as_path(), CacheStatus::Created)
    );
    let elsewhere = root.path().join("caches");
    let other = open_or_quantize(
        &dir,
        Some(&elsewhere),
        QuantType::Nf4,
        true,
        &mut |_, _, _| Ok(()),
    )
    .unwrap();
    assert_eq!(other.0.dir(), elsewhere.join("model-nf4-cache"));
}

#[test]
fn a_touched_source_is_compared_and_kept() {
    let root = tempfile::tempdir().unwrap();
    model(root.path(), None);
    open(root.path());
    touch(
        &root.path().join("model.safetensors"),
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
    );
    assert_eq!(open(root.path()).1, CacheStatus::Refreshed);
    assert_eq!(open(root.path()).1, CacheStatus::Reused);
}

/// Size and mtime as before: only the ctime and the content tell.
#[cfg(unix)]
#[test]
fn a_changed_source_is_noticed_even_with_size_and_time_restored() {
    let root = tempfile::tempdir().unwrap();
    model(root.path(), None);
    let (before, _) = open(root.path());
    let name = "transformer.layers.1.mlp.dense_h_to_4h.weight";
    let codes_before = before.tensor(name).unwrap().bytes().to_vec();

    let path = root.path().join("model.safetensors");
    let (size, mtime) = (
        path.metadata().unwrap().len(),
        path.metadata().unwrap().modified().unwrap(),
    );
    std::thread::sleep(Duration::from_millis(20));
    model(root.path(), Some((name, 30.0)));
    touch(&path, mtime);
    assert_eq!(
        (
            path.metadata().unwrap().len(),
            path.metadata().unwrap().modified().unwrap()
        ),
        (size, mtime)
    );

    let (after, status) = open(root.path());
    assert_eq!(status, CacheStatus::Replaced);
    assert_ne!(after.tensor(name).unwrap().bytes(), codes_before);
    assert_eq!(open(root.path()).1, CacheStatus::Reused);
}

#[test]
fn a_changed_tokenizer_or_config_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    model(root.path(), None);
    open(root.path());
    fs::write(root.path().join("ice_text.model"), "PIECES").unwrap();
    let (checkpoint, status) = open(root.path());
    assert_eq!(status, CacheStatus::Replaced);
    assert_eq!(
        fs::read(checkpoint.dir().join("ice_text.model")).unwrap(),
        b"PIECES"
    );
}

#[test]
fn a_damaged_cache_is_made_again() {
    let root = tempfile::tempdir().unwrap();
    model(root.path(), None);
    open(root.path());
    let weights = root.path().join("nf4-cache/model.safetensors");
    let len = weights.metadata().unwrap().len();
    File::options()
        .write(true)
        .open(&weights)
        .unwrap()
        .set_len(len - 100)
        .unwrap();
    assert_eq!(open(root.path()).1, CacheStatus::Replaced);
}

#[test]
fn a_failure_leaves_nothing_behind_and_names_the_weight() {
    let root = tempfile::tempdir().unwrap();
    let last = "transformer.layers.1.mlp.dense_4h_to_h.weight";
    for (name, value) in [
        (last, f32::NAN),
        (last, f32::INFINITY),
        ("transformer.final_layernorm.bias", f32::NAN),
    ] {
        model(root.path(), Some((name, value)));
        let error =
            open_or_quantize(root.path(), None, QuantType::Nf4, true, &mut |_, _, _| Ok(())).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        let left: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }
}

#[test]
fn what_a_killed_run_left_is_cleared_away() {
    let root = tempfile::tempdir().unwrap();
    model(root.path(), None);
    let partial = root.path().join(".nf4-cache.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join(".model.safetensors.1-0.tmp"), "half").unwrap();
    let (checkpoint, _) = open(root.path());
    assert!(!partial.exists());
    assert_eq!(fs::read_dir(checkpoint.dir()).unwrap().count(), 4);
}

#[test]
fn what_quantize_did_not_write_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    model(&dir, None);
    let source = Checkpoint::open(&dir).unwrap();
    let output = root.path().join("thesis");
    fs::create_dir(&output).unwrap();
    fs::write(output.join("chapter1.tex"), "...").unwrap();
    for target in [output.as_path(), dir.as_path()] {
        assert!(quantize_checkpoint(&source, target, QuantType::Nf4, true, &mut |_, _, _| Ok(())).is_err());
    }
    assert!(output.join("chapter1.tex").exists() && dir.join("model.safetensors").exists());
}

#[test]
fn a_folder_that_cannot_be_written_names_the_remedy() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    model(&dir, None);
    let blocked = root.path().join("file");
    fs::write(&blocked, "").unwrap();
    let error =
        open_or_quantize(&dir, Some(&blocked), QuantType::Nf4, true, &mut |_, _, _| Ok(())).unwrap_err();
    assert!(error.to_string().contains("--cache-dir"), "{error}");
}

#[test]
fn two_writers_do_not_meet() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("out");
    let first = PartialFolder::create(&output).unwrap();
    let error = PartialFolder::create(&output)
        .expect_err("the folder is being written")
        .to_string();
    assert!(error.contains("another glmtune"), "{error}");
    drop(first);
    assert!(PartialFolder::create(&output).is_ok());
}
