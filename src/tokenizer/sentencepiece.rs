//! A SentencePiece unigram model: its file, text to pieces, pieces to text.
//!
//! Follows `sentencepiece_model.proto` and the C++ library; golden tests compare ids and texts with it.

use std::collections::HashSet;

use prost::Message;

use super::normalizer::{Charsmap, SPACE, normalize};
use super::unigram::{Trie, Unigram};
use crate::error::{Error, Result};

/// The file, as far as we need it (field numbers of `sentencepiece_model.proto`).
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerProto>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerProto>,
    #[prost(message, optional, tag = "5")]
    denormalizer: Option<NormalizerProto>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerProto {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(string, optional, tag = "44")]
    unk_surface: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerProto {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// What a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Found in text by its score.
    Normal,
    /// Stands for everything that is not in the table.
    Unknown,
    /// Never found in text, never shown.
    Control,
    /// Found in text and taken whole.
    UserDefined,
    /// Never found in text.
    Unused,
    /// One byte of a character that is not in the table.
    Byte(u8),
}

/// An open model.
pub struct SentencePiece {
    pieces: Vec<(String, Kind)>,
    unigram: Unigram,
    user_defined: Trie,
    charsmap: Charsmap,
    unk: u32,
    unk_surface: String,
    /// The piece of every byte, when the model has byte fallback.
    bytes: Option<Box<[u32; 256]>>,
}

const REMEDY: &str = "use the ice_text.model that belongs to the checkpoint";

impl SentencePiece {
    /// Reads the bytes of a model file; `place` names it in errors.
    pub fn parse(file: &[u8], place: &str) -> Result<Self> {
        let wrong = |found: String, expected: &str| Error::input(place, found, expected, REMEDY);
        let proto = ModelProto::decode(file)
            .map_err(|e| wrong(format!("{} bytes ({e})", file.len()), "a SentencePiece model"))?;
        // They follow the pieces; every model has them.
        let (Some(trainer), Some(normalizer)) = (proto.trainer, proto.normalizer) else {
            let found = format!(
                "{} pieces and then the end (is the file cut off?)",
                proto.pieces.len()
            );
            return Err(wrong(found, "trainer_spec and normalizer_spec after the pieces"));
        };
        // What ChatGLM's models all have; another setting would silently give other ids.
        for (found, expected) in [
            (trainer.model_type.unwrap_or(1) != 1, "model_type UNIGRAM"),
            (
                trainer.treat_whitespace_as_suffix == Some(true),
                "treat_whitespace_as_suffix false",
            ),
            (
                normalizer.add_dummy_prefix == Some(false),
                "add_dummy_prefix true",
            ),
            (
                normalizer.remove_extra_whitespaces == Some(false),
                "remove_extra_whitespaces true",
            ),
            (
                normalizer.escape_whitespaces == Some(false),
                "escape_whitespaces true",
            ),
            (
                proto
                    .denormalizer
                    .and_then(|d| d.precompiled_charsmap)
                    .is_some_and(|map| !map.is_empty()),
                "no denormalizer",
            ),
        ] {
            if found {
                return Err(wrong("another setting".into(), expected));
            }
        }
        let mut pieces = Vec::with_capacity(proto.pieces.len());
        let (mut lowest, mut highest) = (f32::MAX, f32::MIN_POSITIVE);
        for (id, piece) in proto.pieces.iter().enumerate() {
            let text = piece.piece.clone().unwrap_or_default();
            let score = piece.score.unwrap_or_default();
            let kind = match piece.kind.unwrap_or(1) {
                1 => Kind::Normal,
                2 => Kind::Unknown,
                3 => Kind::Control,
                4 => Kind::UserDefined,
                5 => Kind::Unused,
                6 => Kind::Byte(byte_of(&text).ok_or_else(|| {
                    wrong(
                        format!("byte piece {text:?} at id {id}"),
                        "a byte piece such as <0x0A>",
                    )
                })?),
                other => {
                    return Err(wrong(
                        format!("piece type {other} at id {id}"),
                        "a type from 1 to 6",
                    ));
                }
            };
            if text.is_empty() || !score.is_finite() {
                return Err(wrong(
                    format!("piece {text:?} with score {score} at id {id}"),
                    "text and a finite score",
                ));
            }
            if kind == Kind::Normal {
                (lowest, highest) = (lowest.min(score), highest.max(score));
            }
            pieces.push((text, kind));
        }
        let of_kind = |kind| {
            pieces
                .iter()
                .enumerate()
                .filter(move |(_, piece)| piece.1 == kind)
        };
        let unk = match of_kind(Kind::Unknown)
            .map(|(id, _)| id as u32)
            .collect::<Vec<_>>()[..]
        {
            [unk] => unk,
            ref all => {
                return Err(wrong(
                    format!("{} unknown pieces", all.len()),
                    "one unknown piece",
                ));
            }
        };
        let twice = |key: &[u8]| {
            wrong(
                format!("piece {:?} twice", String::from_utf8_lossy(key)),
                "each piece once",
            )
        };
        let mut matched = Vec::with_capacity(pieces.len());
        let mut names = HashSet::with_capacity(pieces.len());
        let mut bytes = [None; 256];
        for (id, (text, kind)) in pieces.iter().enumerate() {
            if !names.insert(text) {
                return Err(twice(text.as_bytes()));
            }
            let score = match kind {
                Kind::Normal => proto.pieces[id].score.unwrap_or_default(),
                // SentencePiece's bonus, so that these are always taken whole.
                Kind::UserDefined => text.len() as f32 * highest - 0.1,
                Kind::Byte(byte) => {
                    bytes[usize::from(*byte)] = Some(id as u32);
                    continue;
                }
                Kind::Unknown | Kind::Control | Kind::Unused => continue,
            };
            matched.push((text.as_bytes(), id as u32, score));
        }
        let unigram = Unigram::new(&matched, lowest, unk).map_err(twice)?;
        let user_defined = of_kind(Kind::UserDefined)
            .map(|(id, piece)| (piece.0.as_bytes(), id as u32))
            .collect();
        let user_defined = Trie::new(user_defined).map_err(twice)?;
        let bytes = if trainer.byte_fallback == Some(true) {
            let mut all = Box::new([0; 256]);
            for (byte, id) in bytes.into_iter().enumerate() {
                all[byte] =
                    id.ok_or_else(|| wrong(format!("no piece <0x{byte:02X}>"), "all 256 byte pieces"))?;
            }
            Some(all)
        } else {
            None
        };
        let charsmap = Charsmap::parse(&normalizer.precompiled_charsmap.unwrap_or_default())
            .map_err(|found| wrong(found, "a precompiled charsmap"))?;
        let unk_surface = trainer.unk_surface.unwrap_or_else(|| " \u{2047} ".into());
        Ok(Self {
            pieces,
            unigram,
            user_defined,
            charsmap,
            unk,
            unk_surface,
            bytes,
        })
    }

    /// The number of pieces.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// The text of piece `id`.
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| piece.0.as_str())
    }

    /// What piece `id` is for.
    pub fn kind(&self, id: u32) -> Option<Kind> {
        self.pieces.get(id as usize).map(|piece| piece.1)
    }

    /// The id of the piece `text`; a scan, for the few names looked up when a model is opened.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.pieces
            .iter()
            .position(|piece| piece.0 == text)
            .map(|id| id as u32)
    }

    /// The ids of `text`, appended to `ids`.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        let text = normalize(text, &self.charsmap, &self.user_defined);
        let mut start = 0;
        for (end, id) in self.unigram.segment(&text) {
            match &self.bytes {
                Some(bytes) if id == self.unk => {
                    ids.extend(
                        text.as_bytes()[start..end]
                            .iter()
                            .map(|&byte| bytes[usize::from(byte)]),
                    );
                }
                _ => ids.push(id),
            }
            start = end;
        }
    }

    /// The text of `ids`: control pieces are invisible, the unknown piece and ids outside the table are shown as
    /// `unk_surface`, bytes that are no UTF-8 as U+FFFD each, and a space before the first visible character is the
    /// one that encoding put there.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut text = String::new();
        let mut bytes = Vec::new();
        for &id in ids {
            let kind = self.kind(id).unwrap_or(Kind::Unknown);
            if let Kind::Byte(byte) = kind {
                bytes.push(byte);
                continue;
            }
            push_utf8(&mut text, &mut bytes);
            match kind {
                Kind::Control => {}
                Kind::Unknown => text.push_str(&self.unk_surface),
                _ => {
                    let piece = self.piece(id).unwrap_or_default();
                    let piece = if text.is_empty() {
                        piece.strip_prefix(SPACE).unwrap_or(piece)
                    } else {
                        piece
                    };
                    text.extend(piece.chars().map(|c| if c == SPACE { ' ' } else { c }));
                }
            }
        }
        push_utf8(&mut text, &mut bytes);
        text
    }
}

/// `<0x0A>` -> 10.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let two = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    two.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Moves `bytes` to `text`; each byte that cannot be read becomes U+FFFD (Rust's own lossy conversion would take
/// several at once).
fn push_utf8(text: &mut String, bytes: &mut Vec<u8>) {
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                break;
            }
            Err(error) => {
                let (valid, bad) = rest.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &bad[1..];
            }
        }
    }
    bytes.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_replaced_one_by_one() {
        let mut text = String::new();
        push_utf8(&mut text, &mut vec![b'a', 0xe4, 0xbd, 0xff, 0xe4, 0xbd, 0xa0]);
        assert_eq!(text, "a\u{fffd}\u{fffd}\u{fffd}你");
    }

    #[test]
    fn byte_pieces_are_read() {
        assert_eq!(byte_of("<0x0A>"), Some(10));
        assert_eq!(byte_of("<0xFF>"), Some(255));
        assert_eq!(byte_of("<0x+A>"), None);
        assert_eq!(byte_of("<0xF>"), None);
        assert_eq!(byte_of("<n>"), None);
    }
}
