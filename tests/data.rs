//! Does it read the data people have, and refuse what it cannot use in one clear line? Tokenizer files, records,
//! samples, batches and their order, on a tokenizer small enough to be written down here.

use std::path::{Path, PathBuf};

use glmtune::data::batch::{IGNORE, Span};
use glmtune::data::collate;
use glmtune::data::loader::{Loader, Validation, split};
use glmtune::data::preview::render_preview;
use glmtune::data::record::{Columns, Question, Record, read_objects, read_records};
use glmtune::data::sample::{Cut, FirstTarget, Options, OverLength, Sample, encode, encode_all};
use glmtune::error::Error;
use glmtune::model::ModelConfig;
use glmtune::tokenizer::{Decode, Tokenizer};

// ---- A tokenizer --------------------------------------------------------------------------------------------------

const NORMAL: u8 = 1;
const UNKNOWN: u8 = 2;
const CONTROL: u8 = 3;
const USER_DEFINED: u8 = 4;
const BYTE: u8 = 6;

/// The pieces of a tokenizer of letters: `(text, score, type)`.
fn pieces() -> Vec<(String, f32, u8)> {
    let mut pieces: Vec<(String, f32, u8)> = Vec::new();
    let mut add = |text: &str, score, kind| pieces.push((text.to_string(), score, kind));
    add("<unk>", 0.0, UNKNOWN);
    for control in ["<s>", "</s>", "<pad>"] {
        add(control, 0.0, CONTROL);
    }
    add("<n>", 0.0, USER_DEFINED);
    add("▁", -2.0, NORMAL);
    for letter in 'a'..='z' {
        add(&letter.to_string(), -3.0, NORMAL);
    }
    for word in ["▁the", "ab", "cd", "问", "答", "：", "[", "]", "R", "0", "1", "2"] {
        add(word, -4.0, NORMAL);
    }
    for control in ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"] {
        add(control, 0.0, CONTROL);
    }
    add("<|tab|>", 0.0, USER_DEFINED);
    for k in 2..=80 {
        add(&format!("<|blank_{k}|>"), 0.0, USER_DEFINED);
    }
    for byte in 0..=255 {
        add(&format!("<0x{byte:02X}>"), 0.0, BYTE);
    }
    pieces
}

/// One field of a protobuf message: its number and, behind a length, its bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    [out, bytes.to_vec()].concat()
}

fn model(pieces: &[(String, f32, u8)]) -> Vec<u8> {
    let mut file = Vec::new();
    for (text, score, kind) in pieces {
        let mut piece = field(1, text.as_bytes());
        piece.push(2 << 3 | 5);
        piece.extend(score.to_le_bytes());
        piece.extend([3 << 3, *kind]);
        file.extend(field(1, &piece));
    }
    // trainer_spec { byte_fallback (35): true } and normalizer_spec {}
    [file, field(2, &[0x98, 0x02, 1]), field(3, &[])].concat()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::parse(&model(&pieces()), "ice_text.model", 0).unwrap()
}

fn config(tokenizer: &Tokenizer) -> ModelConfig {
    let special = tokenizer.special();
    ModelConfig {
        vocab_size: tokenizer.vocab_size(),
        bos_token_id: special.sop,
        eos_token_id: special.eop,
        mask_token_id: special.mask,
        gmask_token_id: special.gmask,
        pad_token_id: special.pad,
        ..ModelConfig::chatglm_6b()
    }
}

fn spelled(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter()
        .map(|&id| tokenizer.piece(id).unwrap().to_string())
        .collect()
}

/// The message, which must be one line.
#[track_caller]
fn message<T>(result: Result<T, Error>) -> String {
    let message = result.err().expect("an error").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[track_caller]
fn assert_says<T>(result: Result<T, Error>, parts: &[&str]) {
    let message = message(result);
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn text_becomes_pieces_and_text_again() {
    let tokenizer = tokenizer();
    let encode = |text: &str| spelled(&tokenizer, &tokenizer.encode(text));
    assert_eq!(encode("the ab"), ["▁the", "▁", "ab"]);
    assert_eq!(encode("a\n\tb"), ["▁", "a", "<n>", "<|tab|>", "b"]);
    assert_eq!(encode("x   y z"), ["▁", "x", "<|blank_3|>", "y", "▁", "z"]);
    assert_eq!(encode("é"), ["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(encode("a <sop> b"), ["▁", "a", "<sop>", "▁", "b"]);
    // Control pieces that are not cut out, byte pieces and the unknown piece are never found in text.
    assert_eq!(encode("[gMASK]").first().map(String::as_str), Some("▁"));
    assert!(
        !encode("[gMASK]<0x07></s>")
            .iter()
            .any(|piece| ["[gMASK]", "<0x07>", "</s>"].contains(&piece.as_str()))
    );
    assert_eq!(tokenizer.encode_plain("<unk>").len(), "▁<unk>".chars().count());
    for text in ["the ab", "a\n\tb", "x   y z", "é你好👋", "", "a\n"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text)), text);
    }
    assert_eq!(
        tokenizer.decode(&[u32::MAX, tokenizer.special().eop]),
        " \u{2047} ",
        "outside the vocabulary"
    );
    let skip = Decode {
        skip_special_tokens: true,
        ..Decode::default()
    };
    assert_eq!(tokenizer.decode_with(&[tokenizer.special().unk], skip), "");
}

#[test]
fn the_older_generation_is_shifted_by_its_image_tokens() {
    let (new, old) = (
        tokenizer(),
        Tokenizer::parse(&model(&pieces()), "ice_text.model", 20000).unwrap(),
    );
    let shifted: Vec<u32> = new.encode("the <eop>ab é").iter().map(|id| id + 20000).collect();
    assert_eq!(old.encode("the <eop>ab é"), shifted);
    assert_eq!(old.decode(&shifted), new.decode(&new.encode("the <eop>ab é")));
    assert_eq!(old.special().sop, new.special().sop + 20000);
    assert_eq!(old.vocab_size(), new.vocab_size() + 20000);
    assert_says(
        old.check(&config(&new)),
        &["config.json", "gmask_token_id", "as in the tokenizer", "150528"],
    );
    old.check(&config(&old)).unwrap();
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let tokenizer = tokenizer();
    let right = config(&tokenizer);
    tokenizer.check(&right).unwrap();
    tokenizer
        .check(&ModelConfig {
            vocab_size: right.vocab_size + 100,
            ..right.clone()
        })
        .unwrap();
    assert_says(
        tokenizer.check(&ModelConfig {
            eos_token_id: 150005,
            ..right.clone()
        }),
        &["eos_token_id 150005"],
    );
    assert_says(
        tokenizer.check(&ModelConfig {
            vocab_size: 100,
            ..right
        }),
        &["vocab_size 100", "at least"],
    );
    assert_says(
        tokenizer.check(&ModelConfig::chatglm_6b()),
        &["gmask_token_id 130001", "130528"],
    );
}

#[test]
fn broken_tokenizer_files_are_refused_with_their_name() {
    let whole = model(&pieces());
    let open = |file: &[u8]| Tokenizer::parse(file, "ice_text.model", 0);
    assert_says(open(&whole[..whole.len() / 2 + 1]), &["ice_text.model"]);
    assert_says(open(&[]), &["ice_text.model", "cut off"]);
    assert_says(
        open(b"PK\x03\x04 this is not it"),
        &["ice_text.model", "SentencePiece"],
    );
    // A length of 2^63: more than there is.
    assert_says(
        open(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        &["SentencePiece"],
    );
    for cut in (0..whole.len()).step_by(97) {
        drop(message(open(&whole[..cut])));
    }
    let altered = |change: fn(&mut Vec<(String, f32, u8)>)| {
        let mut pieces = pieces();
        change(&mut pieces);
        open(&model(&pieces))
    };
    assert_says(
        altered(|p| p.retain(|piece| piece.0 != "<sop>")),
        &["no piece <sop>"],
    );
    assert_says(
        altered(|p| p.push(("the".into(), f32::NAN, NORMAL))),
        &["NaN", "finite score"],
    );
    assert_says(altered(|p| p.push(("a".into(), -1.0, NORMAL))), &["\"a\" twice"]);
    assert_says(altered(|p| p.push(("<0xZZ>".into(), -1.0, BYTE))), &["<0xZZ>"]);
    assert_says(
        altered(|p| p.push((String::new(), -1.0, NORMAL))),
        &["piece \"\""],
    );
    assert_says(altered(|p| p.push(("x1".into(), -1.0, 9))), &["piece type 9"]);
    assert_says(
        altered(|p| p.push(("<unk2>".into(), 0.0, UNKNOWN))),
        &["2 unknown pieces"],
    );
    assert_says(altered(|p| p.retain(|piece| piece.0 != "<0x7F>")), &["<0x7F>"]);
    // model_type BPE, and a charsmap that is none.
    assert_says(
        open(&[&whole[..], &field(2, &[3 << 3, 2])].concat()),
        &["model_type UNIGRAM"],
    );
    assert_says(
        open(&[&whole[..], &field(3, &field(2, &[9, 9]))].concat()),
        &["charsmap"],
    );
    assert_says(
        Tokenizer::open(Path::new("no such folder")),
        &["no such folder", "open"],
    );
}

#[test]
fn a_model_folder_says_how_many_image_tokens_there_are() {
    let dir = tempfile::tempdir().unwrap();
    assert_says(Tokenizer::open(dir.path()), &["ice_text.model"]);
    std::fs::write(dir.path().join("ice_text.model"), model(&pieces())).unwrap();
    let plain = Tokenizer::open(dir.path()).unwrap().special();
    let write = |text: &str| std::fs::write(dir.path().join("tokenizer_config.json"), text).unwrap();
    write(r#"{"num_image_tokens": 20000}"#);
    assert_eq!(
        Tokenizer::open(dir.path()).unwrap().special().sop,
        plain.sop + 20000
    );
    write(r#"{"name_or_path": "x"}"#);
    assert_eq!(Tokenizer::open(dir.path()).unwrap().special(), plain);
    write(r#"{"num_image_tokens": -1}"#);
    assert_says(
        Tokenizer::open(dir.path()),
        &["tokenizer_config.json", "num_image_tokens -1"],
    );
    write("{");
    assert_says(Tokenizer::open(dir.path()), &["tokenizer_config.json", "JSON"]);
}

/// Real text on the real model; the ids were compared with the C++ library, where f64 sums or per-grapheme
/// normalisation (the crate `tokenizers`) give others.
#[test]
fn ties_and_long_matches_are_those_of_sentencepiece() {
    let Some(tokenizer) = shared("tokenizer/ice_text.model").map(|path| Tokenizer::open(&path).unwrap())
    else {
        return;
    };
    let encode = |text: &str| spelled(&tokenizer, &tokenizer.encode(text));
    assert_eq!(encode(&"e".repeat(16)), ["▁e", "eeeeee", "eee", "eeeeee"]);
    assert_eq!(
        encode(&"-".repeat(39)),
        ["▁-------", &"-".repeat(16), &"-".repeat(16)]
    );
    assert_eq!(encode(&"~".repeat(9)), ["▁", "~~~~~", "~~~~"]);
    let dots = [16, 16, 11, 1].map(|n| ".".repeat(n));
    assert_eq!(encode(&".".repeat(44))[1..], dots);
    assert_eq!(encode("ﾊﾞ"), encode("バ"));
}

/// A file of the shared folder, or a loud line.
fn shared(relative: &str) -> Option<PathBuf> {
    let dir = match std::env::var_os("GLMTUNE_SHARED") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
    };
    let path = dir.join(relative);
    if !path.exists() {
        eprintln!("SKIPPED: no {relative} in GLMTUNE_SHARED");
        return None;
    }
    Some(path)
}

// ---- Records ------------------------------------------------------------------------------------------------------

fn read(bytes: &[u8]) -> Result<(Vec<Record>, String), Error> {
    read_with(bytes, &Columns::default())
}

fn read_with(bytes: &[u8], columns: &Columns) -> Result<(Vec<Record>, String), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.json");
    std::fs::write(&path, bytes).unwrap();
    read_records(&path, columns)
}

fn pair(record: &Record) -> (&str, &str) {
    (&record.prompt, &record.response)
}

#[test]
fn every_shape_of_record_is_read() {
    let (records, line) = read(
        br#"[{"instruction": "do", "input": "this", "output": "done"},
             {"instruction": "do", "input": "", "output": "it"}, {"instruction": "do", "output": "x"}]"#,
    )
    .unwrap();
    assert_eq!(
        records.iter().map(pair).collect::<Vec<_>>(),
        [("do\nthis", "done"), ("do", "it"), ("do", "x")]
    );
    assert_eq!(
        line,
        "alpaca: question from instruction + input, answer from output"
    );
    assert!(records[0].place.ends_with("data.json:1") && records[2].place.ends_with("data.json:2"));

    let (records, line) = read(b"\xef\xbb\xbf\r\n{\"content\": \"c\", \"summary\": \"s\"}\r\n\r\n").unwrap();
    assert_eq!(pair(&records[0]), ("c", "s"));
    assert!(
        records[0].place.ends_with(":2") && line.starts_with("AdvertiseGen"),
        "{line}"
    );

    let text = r#"{"prompt": "q", "response": "r", "history": [["a", "b"], ["c", "d"]], "id": 7}"#;
    let (records, line) = read(text.as_bytes()).unwrap();
    assert_eq!(
        records[0].history,
        [("a".into(), "b".into()), ("c".into(), "d".into())]
    );
    assert_eq!(
        line,
        "prompt/response: question from prompt, answer from response, earlier turns from history; not used: id"
    );

    let columns = Columns {
        prompt: Some("x".into()),
        response: Some("y".into()),
        history: Some("h".into()),
    };
    let (records, _) = read_with(br#"{"x": "1", "y": "2", "h": [], "prompt": "no"}"#, &columns).unwrap();
    assert_eq!(pair(&records[0]), ("1", "2"));
    assert_says(read_with(br#"{"x": "1", "y": "2"}"#, &columns), &["column h"]);
}

#[test]
fn questions_need_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.jsonl");
    std::fs::write(
        &path,
        "{\"instruction\": \"a\", \"input\": \"b\"}\n\n{\"prompt\": \"c\"}\n",
    )
    .unwrap();
    let objects = read_objects(&path).unwrap();
    let asked: Vec<_> = objects
        .iter()
        .map(|(line, object)| {
            (
                *line,
                Question::of(object, &Columns::default(), "in").unwrap().query,
            )
        })
        .collect();
    assert_eq!(asked, [(1, "a\nb".to_string()), (3, "c".to_string())]);
    let columns = Columns {
        prompt: Some("input".into()),
        ..Columns::default()
    };
    assert_eq!(Question::of(&objects[0].1, &columns, "in").unwrap().query, "b");
    let columns = Columns {
        prompt: Some("other".into()),
        ..Columns::default()
    };
    assert_says(
        Question::of(&objects[0].1, &columns, "in"),
        &["in", "column other"],
    );
}

#[test]
fn bad_data_ends_in_one_line_that_names_the_place() {
    assert_says(read(b""), &["data.json", "an empty file"]);
    assert_says(read(b" \n\xef\xbb\xbf"), &["data.json"]);
    assert_says(read(b"\xef\xbb\xbf \n"), &["an empty file"]);
    assert_says(read(b"[ ]"), &["data.json", "no records"]);
    assert_says(
        read(b"{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"\xff\"}"),
        &[":2", "0xff", "UTF-8"],
    );
    assert_says(
        read(b"{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \n"),
        &[":2", "mend the line"],
    );
    assert_says(
        read(b"[\n{\"prompt\": \"a\", \"response\": \"b\"},\n{\"prompt\" \"a\"}\n]"),
        &[":3"],
    );
    assert_says(
        read(b"[\n{\"prompt\": \"a\", \"response\": \"b\"}\n\n{}]"),
        &[":4", "comma"],
    );
    assert_says(
        read(b"[{\"prompt\": \"a\", \"response\": \"b\"}"),
        &[":1", "end of the file"],
    );
    assert_says(
        read(b"[{\"prompt\": \"a\", \"response\": \"b\"},"),
        &[":1", "end of the file"],
    );
    assert_says(read(b"["), &[":1", "end of the file"]);
    assert_says(read(b"[]\nx"), &[":2", "after the array"]);
    assert_says(read(b"[1]"), &[":1", "a number"]);
    assert_says(read(b"\"text\""), &[":1", "text"]);
    assert_says(
        read(b"{\"messages\": [], \"id\": 1}"),
        &["columns messages, id", "--prompt-column"],
    );
    assert_says(read(b"{}"), &["no columns"]);
    let second =
        |record: &str| read(format!("{{\"prompt\": \"a\", \"response\": \"b\"}}\n{record}").as_bytes());
    assert_says(second(r#"{"prompt": "a"}"#), &[":2", "a column response"]);
    assert_says(
        read(br#"{"prompt": "a", "response": " \n"}"#),
        &[":1", "no answer in response"],
    );
    assert_says(
        second(r#"{"prompt": "", "response": "b"}"#),
        &[":2", "an empty question"],
    );
    assert_says(
        second(r#"{"prompt": "a", "response": ["b"]}"#),
        &[":2", "a list in response"],
    );
    assert_says(
        second(r#"{"prompt": 1, "response": "b"}"#),
        &[":2", "a number in prompt"],
    );
    assert_says(
        second(r#"{"prompt": "a", "response": "b", "history": [["x"]]}"#),
        &[":2", "a list in history"],
    );
    assert_says(
        second(r#"{"prompt": "a", "response": "b", "history": "x"}"#),
        &[":2", "text in history"],
    );
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_says(read(deep.as_bytes()), &[":1"]);
    assert_says(
        read_records(Path::new("no.json"), &Columns::default()),
        &["no.json", "open"],
    );
}

#[test]
fn the_real_data_sets_are_read() {
    for (name, records) in [
        ("spo_0.json", 1441 - 22),
        ("spo_1.json", 50),
        ("alpaca_zh_demo.json", 1000),
        ("self_cognition.json", 80),
    ] {
        let Some(path) = shared(&format!("data/{name}")) else {
            return;
        };
        let (read, line) = read_records(&path, &Columns::default()).unwrap();
        assert_eq!(read.len(), records, "{name}");
        assert!(line.starts_with("alpaca: "), "{line}");
    }
}

// ---- Samples ------------------------------------------------------------------------------------------------------

/// `prompt` words of one token each (after the first), an answer of as many letters, and one-letter turns.
fn record(prompt: &str, response: &str, turns: usize) -> Record {
    let history = (0..turns).map(|_| ("q".to_string(), "r".to_string())).collect();
    Record {
        prompt: prompt.into(),
        response: response.into(),
        history,
        place: "data:1".into(),
    }
}

fn one(record: &Record, options: &Options) -> (Option<Sample>, Vec<Cut>) {
    encode(&tokenizer(), record, options).unwrap()
}

#[test]
fn a_sample_supervises_the_answer_and_its_end() {
    let tokenizer = tokenizer();
    let (sample, cuts) = one(&record("xy", "z", 0), &Options::default());
    let sample = sample.unwrap();
    assert_eq!(
        spelled(&tokenizer, &sample.ids),
        ["▁", "x", "y", "[gMASK]", "<sop>", "▁", "z", "<eop>"]
    );
    assert_eq!((sample.mask, sample.context, cuts), (3, 4, vec![]));
    let supervised = |sample: &Sample| sample.labels.iter().position(|&label| label != IGNORE).unwrap();
    assert_eq!(
        supervised(&sample),
        4,
        "<sop> is the first target of the official code"
    );
    assert_eq!(
        sample.labels[4..],
        sample.ids[4..].iter().map(|&id| id as i32).collect::<Vec<_>>()
    );
    let options = Options {
        first_target: FirstTarget::Answer,
        ..Options::default()
    };
    assert_eq!(supervised(&one(&record("xy", "z", 0), &options).0.unwrap()), 5);
    assert_eq!(
        one(&record("x <eop> y", "z", 0), &Options::default()).1,
        [Cut::SpecialToken]
    );
}

#[test]
fn what_is_too_long_is_cut_in_order_and_counted() {
    let tokenizer = tokenizer();
    let length = |record: &Record| one(record, &Options::default()).0.unwrap().ids.len();
    let (none, two) = (length(&record("abc", "xyz", 0)), length(&record("abc", "xyz", 2)));
    let limit = |max_length| Options {
        max_length: Some(max_length),
        ..Options::default()
    };
    assert_eq!(one(&record("abc", "xyz", 2), &limit(two)).1, []);
    // The oldest turn goes first; with the last turn the rounds go too.
    let (sample, cuts) = one(&record("abc", "xyz", 2), &limit(two - 1));
    assert_eq!(cuts, [Cut::Turns(1)]);
    assert_eq!(
        sample.unwrap().ids,
        one(&record("abc", "xyz", 1), &Options::default()).0.unwrap().ids
    );
    let (sample, cuts) = one(&record("abc", "xyz", 2), &limit(none));
    assert_eq!((sample.unwrap().ids.len(), cuts), (none, vec![Cut::Turns(2)]));
    // Then the beginning of the question, and the end of the answer with its <eop>.
    let source = Options {
        max_source_length: Some(3),
        ..Options::default()
    };
    let (sample, cuts) = one(&record("xyz", "z", 1), &source);
    assert_eq!(
        spelled(&tokenizer, &sample.unwrap().ids)[..3],
        ["y", "z", "[gMASK]"]
    );
    assert_eq!(cuts, [Cut::Turns(1), Cut::Prompt(2)]);
    let target = Options {
        max_target_length: Some(4),
        ..Options::default()
    };
    let (sample, cuts) = one(&record("x", "uvwz", 0), &target);
    assert_eq!(
        spelled(&tokenizer, &sample.unwrap().ids)[3..],
        ["<sop>", "▁", "u"]
    );
    assert_eq!(cuts, [Cut::Answer(3)]);
    // The official way keeps the beginning, and an <eop> behind a cut answer.
    let official = Options {
        over_length: OverLength::Official,
        ..source
    };
    let (sample, cuts) = one(&record("xyz", "z", 0), &official);
    assert_eq!(
        spelled(&tokenizer, &sample.unwrap().ids)[..3],
        ["▁", "x", "[gMASK]"]
    );
    assert_eq!(cuts, [Cut::Prompt(2)]);
    let official = Options {
        over_length: OverLength::Official,
        ..target
    };
    let (sample, _) = one(&record("x", "uvwz", 0), &official);
    assert_eq!(
        spelled(&tokenizer, &sample.unwrap().ids)[3..],
        ["<sop>", "▁", "u", "<eop>"]
    );
}

#[test]
fn what_is_too_long_can_be_left_out_or_stop_the_run() {
    let tokenizer = tokenizer();
    let records = [
        record("a", "z", 0),
        record(&"x".repeat(50), "z", 0),
        record("a", "z", 9),
    ];
    let with = |over_length| Options {
        max_length: Some(20),
        over_length,
        ..Options::default()
    };
    let (samples, report) = encode_all(&tokenizer, &records, &with(OverLength::Drop)).unwrap();
    assert_eq!((samples.len(), report.samples, report.records), (2, 2, 3));
    assert_eq!(report.cuts[0].1, Cut::Record(51 + 2 + 3 - 20));
    assert_eq!(report.cuts[1].1, Cut::Turns(9));
    let text = report.to_string();
    assert!(
        text.contains("2 samples of 3 records") && text.contains("1 of 3 records were left out"),
        "{text}"
    );
    assert!(
        text.contains("1 of 3 records lost their oldest turns (9 turns): data:1"),
        "{text}"
    );
    assert_says(
        encode_all(&tokenizer, &records, &with(OverLength::Error)),
        &["data:1", "51", "--over-length"],
    );
    assert_says(
        encode_all(&tokenizer, &records[1..2], &with(OverLength::Drop)),
        &["1 records", "--max-length"],
    );
    for options in [
        Options {
            max_length: Some(4),
            ..Options::default()
        },
        Options {
            max_source_length: Some(1),
            ..Options::default()
        },
        Options {
            max_target_length: Some(2),
            ..Options::default()
        },
    ] {
        assert_says(encode_all(&tokenizer, &records, &options), &["expected at least"]);
    }
}

#[test]
fn no_sample_is_longer_than_the_limits() {
    let tokenizer = tokenizer();
    for (prompt, answer, turns) in [(1, 1, 0), (40, 1, 3), (1, 40, 0), (30, 30, 2), (7, 9, 5)] {
        for limit in 5..40 {
            let record = record(&"x".repeat(prompt), &"z".repeat(answer), turns);
            let options = Options {
                max_length: Some(limit),
                ..Options::default()
            };
            let sample = encode(&tokenizer, &record, &options).unwrap().0.unwrap();
            assert!(
                sample.ids.len() <= limit,
                "{} ids with a limit of {limit}",
                sample.ids.len()
            );
            assert!(
                sample.context >= 2 && sample.ids.len() > sample.context + 1,
                "something of both remains"
            );
        }
    }
}

// ---- Batches and their order --------------------------------------------------------------------------------------

#[test]
fn batches_are_padded_right_for_training_and_left_for_generation() {
    let tokenizer = tokenizer();
    let special = tokenizer.special();
    let (short, long) = (record("x", "z", 0), record("xy", "uz", 0));
    let samples = [&short, &long].map(|record| one(record, &Options::default()).0.unwrap());
    let batch = collate::right_pad(&[&samples[0], &samples[1]], special.pad, None);
    assert_eq!((batch.size, batch.len), (2, 9));
    assert_eq!(batch.ids[7..9], [special.pad as i32; 2]);
    assert_eq!(batch.labels[7..9], [IGNORE; 2]);
    assert_eq!(
        batch.spans,
        [Span { start: 0, context: 3 }, Span { start: 0, context: 4 }]
    );
    let positions = [
        [0, 0],
        [1, 0],
        [2, 0],
        [2, 1],
        [2, 2],
        [2, 3],
        [2, 4],
        [2, 5],
        [2, 6],
    ];
    assert_eq!(batch.positions[..18], positions.concat());
    assert_eq!(batch.supervised(), 4 + 5);
    assert_eq!(collate::right_pad(&[&samples[0]], special.pad, Some(12)).len, 12);
    assert_eq!(
        collate::right_pad(&[&samples[0]], special.pad, Some(3)).len,
        samples[0].ids.len(),
        "never cut"
    );

    let prompts = ["x", "xyz"].map(|text| tokenizer.build_inputs(&tokenizer.encode(text), None));
    let batch = collate::left_pad(&prompts, &special);
    assert_eq!(
        batch.spans,
        [Span { start: 2, context: 5 }, Span { start: 0, context: 5 }]
    );
    assert_eq!(
        batch.positions[..12],
        [[0, 0], [0, 0], [0, 0], [1, 0], [2, 0], [2, 1]].concat()
    );
    assert_eq!(batch.ids[..2], [special.pad as i32; 2]);
    assert_eq!(batch.supervised(), 0);

    assert_says(
        collate::from_ids_model(&[vec![7, 8]], &[], &special),
        &["row 0", "no <sop>"],
    );
    assert_says(
        collate::from_ids_model(&[vec![special.sop]], &[], &special),
        &["no [gMASK]"],
    );
    assert_says(
        collate::from_ids_tokenizer(&[vec![7], vec![7, 8]], &[], &special),
        &["row 1"],
    );
}

#[test]
fn every_sample_comes_once_an_epoch_and_any_step_is_known_from_its_number() {
    let loader = Loader::new(23, 3, 2, 42);
    assert_eq!(loader.steps_per_epoch(), 4);
    let epoch = |loader: &Loader, epoch: u64| -> Vec<Vec<Vec<usize>>> {
        (epoch * 4..(epoch + 1) * 4)
            .map(|step| loader.step(step))
            .collect()
    };
    let first = epoch(&loader, 0);
    assert_eq!(first[0].iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
    assert_eq!(
        first[3].iter().map(Vec::len).collect::<Vec<_>>(),
        [3, 2],
        "the last step takes what is left"
    );
    let mut seen = first.concat().concat();
    assert_ne!(seen, (0..23).collect::<Vec<_>>(), "shuffled");
    assert_ne!(seen, epoch(&loader, 1).concat().concat(), "every epoch anew");
    assert_ne!(
        seen,
        epoch(&Loader::new(23, 3, 2, 43), 0).concat().concat(),
        "by the seed"
    );
    seen.sort_unstable();
    assert_eq!(seen, (0..23).collect::<Vec<_>>());
    // A resumed run, which has not seen the steps before.
    let resumed = Loader::new(23, 3, 2, 42);
    assert_eq!(
        (resumed.step(6), resumed.step(1)),
        (loader.step(6), loader.step(1))
    );
    assert_eq!(loader.epoch(7), 1);
    let in_order = Loader::new(5, 2, 1, 1).sequential();
    assert_eq!(
        (0..3)
            .map(|step| in_order.step(step))
            .collect::<Vec<_>>()
            .concat(),
        [vec![0, 1], vec![2, 3], vec![4]]
    );
    assert_eq!(Loader::new(2, usize::MAX, 9, 0).step(0).len(), 1);
}

#[test]
fn the_validation_split_depends_on_the_seed_alone() {
    let (train, held_back) = split(100, Validation::Ratio(0.1), 7).unwrap();
    assert_eq!((train.len(), held_back.len()), (90, 10));
    let mut all = [train.clone(), held_back.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (0..100).collect::<Vec<_>>());
    assert!(held_back.is_sorted() && train.is_sorted());
    assert_eq!(split(100, Validation::Count(10), 7).unwrap().1, held_back);
    assert_ne!(split(100, Validation::Count(10), 8).unwrap().1, held_back);
    assert_eq!(split(3, Validation::Ratio(0.01), 7).unwrap().1.len(), 1);
    assert_eq!(split(3, Validation::Ratio(0.0), 7).unwrap().1.len(), 0);
    assert_says(split(3, Validation::Count(3), 7), &["3 of 3"]);
    for ratio in [1.0, -0.1, f64::NAN] {
        assert_says(split(3, Validation::Ratio(ratio), 7), &["validation ratio"]);
    }
}

#[test]
fn the_preview_shows_ids_pieces_and_what_is_supervised() {
    let tokenizer = tokenizer();
    let sample = one(&record("xy", "z", 0), &Options::default()).0.unwrap();
    let text = render_preview(&tokenizer, &vec![sample; 5]);
    assert_eq!(text.matches("data:1: 8 tokens, 4 supervised").count(), 3);
    let (context, supervised) = text.split_once("supervised (4 tokens)").unwrap();
    assert!(
        context.contains("context (4 tokens)") && context.contains(" x:29 y:30 [gMASK]:45"),
        "{text}"
    );
    assert!(
        supervised.contains("<sop>:48") && supervised.contains("<eop>:49"),
        "{text}"
    );
    assert!(text.lines().all(|line| line.chars().count() <= 110));
}
