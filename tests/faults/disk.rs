//! Writers that are interrupted, misused or refused by the system.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use glmtune::checkpoint::{
    SafetensorsWriter, TorchBinWriter, atomic, read_tensors, write_safetensors, write_torch_bin,
};
use glmtune::tensor::{DType, Shape, Tensor};

use crate::refused;

#[test]
fn writers_notice_what_is_written_twice_short_or_never_and_leave_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let specs = [
        ("a".to_string(), DType::U8, Shape::new(&[3])),
        ("b".to_string(), DType::F32, Shape::new(&[2])),
    ];
    let mut writer = SafetensorsWriter::create(&path, &specs, &BTreeMap::new()).unwrap();
    writer.write("b", &[0; 8]).unwrap();
    refused(writer.write("b", &[0; 8]), &["second write"]);
    refused(writer.write("c", &[0; 8]), &["named in the header"]);
    refused(writer.write("a", &[0; 4]), &["4 bytes", "3 bytes"]);
    refused(writer.finish(), &["never written", "a"]);
    let twice = [specs[0].clone(), specs[0].clone()];
    refused(
        SafetensorsWriter::create(&path, &twice, &BTreeMap::new()).map(drop),
        &["two tensors named a"],
    );
    let path = dir.path().join("w.bin");
    let mut writer = TorchBinWriter::create(&path, &specs).unwrap();
    refused(
        writer.write_from("a", |w| w.write_all(&[0; 4])),
        &["4 bytes", "3 bytes"],
    );
    refused(writer.finish(), &["never written"]);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing may be left behind"
    );
}

/// Runs itself again in a process that may write no file larger than 64 KiB: the system then refuses as a full disk
/// does, in the middle of a file.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_the_old_file_whole() {
    let dir = tempfile::tempdir().unwrap();
    let old = Tensor::from_slice(&[1f32, 2.0], [2]);
    for name in ["adapter_model.safetensors", "adapter_model.bin"] {
        let path = dir.path().join(name);
        match name {
            "adapter_model.bin" => write_torch_bin(&path, &[("w".to_string(), &old)]).unwrap(),
            _ => write_safetensors(&path, &[("w".to_string(), &old)], &BTreeMap::new()).unwrap(),
        }
    }
    atomic::write(&dir.path().join("run.toml"), b"old").unwrap();
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact disk::child_with_a_full_disk --nocapture";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env("GLMTUNE_TEST_FULL_DISK", dir.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        3,
        "temporary files left behind"
    );
    for name in ["adapter_model.safetensors", "adapter_model.bin"] {
        assert_eq!(
            read_tensors(&dir.path().join(name)).unwrap()["w"].to_f64_vec(),
            [1.0, 2.0]
        );
    }
    assert_eq!(fs::read(dir.path().join("run.toml")).unwrap(), b"old");
}

/// The child process of the test above; on its own it has nothing to do.
#[test]
fn child_with_a_full_disk() {
    let Some(dir) = std::env::var_os("GLMTUNE_TEST_FULL_DISK").map(PathBuf::from) else {
        return;
    };
    let large = Tensor::zeros(DType::F32, [1 << 18]);
    let tensors = [("w".to_string(), &large)];
    let path = dir.join("adapter_model.safetensors");
    refused(
        write_safetensors(&path, &tensors, &BTreeMap::new()),
        &["adapter_model.safetensors", "cannot write"],
    );
    refused(
        write_torch_bin(&dir.join("adapter_model.bin"), &tensors),
        &["adapter_model.bin", "cannot write"],
    );
    refused(
        atomic::write(&dir.join("run.toml"), &[0; 1 << 18]),
        &["run.toml", "cannot write"],
    );
}
