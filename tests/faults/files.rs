//! Files of weights that lie.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use glmtune::checkpoint::{read_tensors, write_safetensors, write_torch_bin};
use glmtune::tensor::{Shape, Tensor};

use crate::refused;

/// A stored zip archive with the given entries.
fn archive(path: &Path, entries: &[(&str, &[u8])], method: zip::CompressionMethod) {
    let mut writer = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in entries {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// A `.bin` whose only tensor `w` has the given parts of its pickle.
fn bin_with(path: &Path, elements: i32, offset: i32, size: &[u8], stride: &[u8], data: &[u8]) {
    let mut pickle = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage".to_vec();
    pickle.extend_from_slice(b"ctorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ");
    pickle.extend_from_slice(&elements.to_le_bytes());
    pickle.extend_from_slice(b"tQJ");
    pickle.extend_from_slice(&offset.to_le_bytes());
    pickle.extend_from_slice(size);
    pickle.extend_from_slice(stride);
    pickle.extend_from_slice(b"\x89ccollections\nOrderedDict\n)RtRs.");
    let entries: [(&str, &[u8]); 2] = [("archive/data.pkl", &pickle), ("archive/data/0", data)];
    archive(path, &entries, zip::CompressionMethod::Stored);
}

#[test]
fn a_pickle_that_would_run_a_command_runs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let proof = dir.path().join("it-ran");
    let command = format!("touch '{}'", proof.display());
    let text = |s: &str| [b"X".as_slice(), &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat();
    let path = dir.path().join("pytorch_model.bin");
    // os.system(command), as pickle protocol 2 spells it.
    let call = [b"cos\nsystem\n".to_vec(), text(&command), b"\x85R".to_vec()].concat();
    let bare = [b"\x80\x02".to_vec(), call.clone(), b".".to_vec()].concat();
    // The same inside a dictionary, as the value of a weight.
    let inside = [b"\x80\x02}".to_vec(), text("w"), call, b"s.".to_vec()].concat();
    // As protocol 4 spells it, and by a name that is only reached through the memo.
    let modern = [
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93".to_vec(),
        text(&command),
        b"\x85R.".to_vec(),
    ]
    .concat();
    for pickle in [&bare, &inside, &modern] {
        archive(
            &path,
            &[("archive/data.pkl", pickle)],
            zip::CompressionMethod::Stored,
        );
        refused(
            read_tensors(&path),
            &["pytorch_model.bin", "os.system", "this file wants to run code"],
        );
    }
    for (module, name) in [
        ("builtins", "eval"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.storage", "_load_from_bytes"),
    ] {
        let pickle = format!("\u{2}c{module}\n{name}\n.").into_bytes();
        let pickle = [b"\x80".to_vec(), pickle].concat();
        archive(
            &path,
            &[("archive/data.pkl", &pickle)],
            zip::CompressionMethod::Stored,
        );
        refused(read_tensors(&path), &[&format!("{module}.{name}")]);
    }
    assert!(!proof.exists(), "the command ran");
    // The command itself works: the proof could have appeared.
    if cfg!(unix) {
        assert!(
            std::process::Command::new("sh")
                .args(["-c", &command])
                .status()
                .unwrap()
                .success()
        );
        assert!(proof.exists());
    }
}

#[test]
fn opcodes_outside_the_list_and_broken_pickles_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.bin");
    let nested = [vec![0x80, 2, b')'], vec![0x85; 1_000_000], vec![b'.']].concat();
    let growing = [vec![0x80, 2], b"(tq\0".repeat(200_000), vec![b'.']].concat();
    let too_large = vec![b'N'; 5 << 20];
    let cases: [(&[u8], &str); 14] = [
        (b"\x80\x02(S'touch x'\nios\nsystem\n.", "opcode 'S'"),
        (b"\x80\x02(ios\nsystem\n.", "opcode 'i'"),
        (b"\x80\x02]R.", "opcode ']'"),
        (b"", "breaks off"),
        (b"\x80\x02}", "breaks off"),
        (b"\x80\x02X\xff\xff\xff\xffabc", "breaks off"),
        (b"\x80\x02R.", "empty stack"),
        (b"\x80\x02t.", "misses a mark"),
        (b"\x80\x02(}t}u.", "mark"),
        (b"\x80\x02h\x07.", "never kept"),
        (b"\x80\x02}K\x01K\x02s.", "a key that is no text"),
        (&nested, "something else than a dictionary"),
        (&growing, "something else than a dictionary"),
        (&too_large, "at most 4 MiB"),
    ];
    for (pickle, word) in cases {
        archive(
            &path,
            &[("archive/data.pkl", pickle)],
            zip::CompressionMethod::Stored,
        );
        refused(read_tensors(&path), &["a.bin", word]);
    }
}

#[test]
fn tensors_outside_their_storage_or_not_contiguous_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.bin");
    let data = [0u8; 24];
    bin_with(&path, 6, 0, b"K\x02K\x03\x86", b"K\x03K\x01\x86", &data);
    assert_eq!(read_tensors(&path).unwrap()["w"].shape(), Shape::new(&[2, 3]));
    bin_with(&path, 6, 2, b"K\x02K\x01\x86", b"K\x01K\x63\x86", &data);
    assert_eq!(
        read_tensors(&path).unwrap()["w"].shape(),
        Shape::new(&[2, 1]),
        "the stride of an extent of 1 is free"
    );
    // Transposed.
    bin_with(&path, 6, 0, b"K\x03K\x02\x86", b"K\x01K\x03\x86", &data);
    refused(read_tensors(&path), &["a.bin: w", "[1, 3]", "contiguous"]);
    // One element past the end, and from a far offset.
    bin_with(&path, 6, 1, b"K\x02K\x03\x86", b"K\x03K\x01\x86", &data);
    refused(read_tensors(&path), &["a.bin: w", "element 1", "6 elements"]);
    bin_with(&path, 6, i32::MAX, b"K\x01\x85", b"K\x01\x85", &data);
    refused(read_tensors(&path), &["a.bin: w", "inside its 6 elements"]);
    bin_with(&path, 6, -1, b"K\x01\x85", b"K\x01\x85", &data);
    refused(read_tensors(&path), &["-1"]);
    // A storage shorter than it claims.
    bin_with(&path, 7, 0, b"K\x07\x85", b"K\x01\x85", &data);
    refused(read_tensors(&path), &["a.bin: w", "24 bytes", "7 elements"]);
    // 2^60 rows, and a product that overflows.
    let huge = b"\x8a\x08\0\0\0\0\0\0\0\x10";
    bin_with(
        &path,
        6,
        0,
        &[huge.as_slice(), b"\x85"].concat(),
        b"K\x01\x85",
        &data,
    );
    refused(read_tensors(&path), &["a.bin: w", "1152921504606846976"]);
    bin_with(
        &path,
        6,
        0,
        &[huge.as_slice(), huge, b"\x86"].concat(),
        b"K\x01K\x01\x86",
        &data,
    );
    refused(read_tensors(&path), &["a.bin: w", "fit into memory"]);
    bin_with(
        &path,
        6,
        0,
        b"(K\x01K\x01K\x01K\x01K\x06t",
        b"(K\x06K\x06K\x06K\x06K\x01t",
        &data,
    );
    refused(read_tensors(&path), &["at most four extents"]);
}

#[test]
fn what_is_no_torch_zip_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    let cases: [(&[u8], &[&str]); 4] = [
        (b"", &["an empty file"]),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            &["Git LFS pointer", "git lfs pull"],
        ),
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
            &["before version 1.6"],
        ),
        (b"<html>404</html>", &["something else than a zip archive"]),
    ];
    for (bytes, words) in cases {
        fs::write(&path, bytes).unwrap();
        refused(read_tensors(&path), words);
    }
    archive(
        &path,
        &[("archive/data.txt", b"x")],
        zip::CompressionMethod::Stored,
    );
    refused(read_tensors(&path), &["without exactly one data.pkl"]);
    archive(
        &path,
        &[("a/data.pkl", b"\x80\x02}."), ("a/byteorder", b"big")],
        zip::CompressionMethod::Stored,
    );
    refused(read_tensors(&path), &["big-endian"]);
    refused(
        read_tensors(&dir.path().join("nothing.bin")),
        &["nothing.bin", "cannot open"],
    );
    refused(read_tensors(dir.path()), &["file"]);
}

#[test]
fn every_truncation_of_a_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = Tensor::from_slice(&[1f32, 2.0, 3.0], [3]);
    for name in ["t.bin", "t.safetensors"] {
        let path = dir.path().join(name);
        let tensors = [("w".to_string(), &tensor)];
        match name {
            "t.bin" => write_torch_bin(&path, &tensors).unwrap(),
            _ => write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap(),
        }
        let whole = fs::read(&path).unwrap();
        read_tensors(&path).unwrap();
        for n in 0..whole.len() {
            fs::write(&path, &whole[..n]).unwrap();
            refused(read_tensors(&path), &[name]);
        }
    }
}

#[test]
fn a_damaged_byte_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = Tensor::from_slice(&[1f32, 2.0, 3.0], [3]);
    for name in ["t.bin", "t.safetensors"] {
        let path = dir.path().join(name);
        let tensors = [("w".to_string(), &tensor)];
        match name {
            "t.bin" => write_torch_bin(&path, &tensors).unwrap(),
            _ => write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap(),
        }
        let whole = fs::read(&path).unwrap();
        for n in 0..whole.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[n] ^= flip;
                fs::write(&path, &bytes).unwrap();
                // Weights carry no checksum that is read; all that is asked here is an answer.
                let _ = read_tensors(&path);
            }
        }
    }
}

#[test]
fn absurd_safetensors_headers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let with = |length: u64, header: &str| {
        fs::write(
            &path,
            [length.to_le_bytes().as_slice(), header.as_bytes(), &[0; 8]].concat(),
        )
        .unwrap();
    };
    let header = |text: &str| with(text.len() as u64, text);
    for length in [u64::MAX, 1 << 60, 1 << 32, 99] {
        with(length, "{}");
        refused(
            read_tensors(&path),
            &["model.safetensors", "truncated or damaged"],
        );
    }
    for text in [
        r#"{"w":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,8]}}"#,
        r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#,
        r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#,
        r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        r#"{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
        r#"{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#,
        r#"{"w":{"dtype":"X","shape":[2],"data_offsets":[0,8]}}"#,
        "not json",
    ] {
        header(text);
        refused(read_tensors(&path), &["model.safetensors"]);
    }
    header(r#"{"w":{"dtype":"I16","shape":[4],"data_offsets":[0,8]}}"#);
    refused(read_tensors(&path), &["model.safetensors: w", "I16"]);
    header(r#"{"w":{"dtype":"F32","shape":[1,1,1,1,2],"data_offsets":[0,8]}}"#);
    refused(read_tensors(&path), &["model.safetensors: w", "four extents"]);
    header(r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#);
    assert_eq!(read_tensors(&path).unwrap()["w"].shape(), Shape::new(&[2]));
}
