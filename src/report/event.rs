//! The messages of TensorBoard's event files, as far as we write them, and the frames they stand in.
//!
//! Field numbers: `event.proto`, `summary.proto` and `tensor.proto` of TensorFlow. Frames: TFRecord, that is
//! `length: u64`, `crc(length): u32`, the data, `crc(data): u32`, all little endian, where
//! `crc(x) = rotate_right(crc32c(x), 15) + 0xa282ead8`.

use prost::Message;

/// The type of a tensor of strings.
pub(super) const DT_STRING: i32 = 7;
/// [`SessionLog::status`]: a program begins to write at the step of the event; what was at that step or later is void.
pub(super) const SESSION_START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    #[prost(int64, tag = "2")]
    pub step: i64,
    /// Of the first event of a file.
    #[prost(string, optional, tag = "3")]
    pub file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    pub summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    pub session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SummaryValue {
    #[prost(string, tag = "1")]
    pub tag: String,
    /// A scalar. Optional, so that 0 is written: an absent number would be no number.
    #[prost(float, optional, tag = "2")]
    pub simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    pub tensor: Option<TensorProto>,
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<SummaryMetadata>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SummaryMetadata {
    #[prost(message, optional, tag = "1")]
    pub plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PluginData {
    #[prost(string, tag = "1")]
    pub plugin_name: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TensorProto {
    #[prost(int32, tag = "1")]
    pub dtype: i32,
    #[prost(message, optional, tag = "2")]
    pub tensor_shape: Option<TensorShape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TensorShape {
    #[prost(message, repeated, tag = "2")]
    pub dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Dimension {
    #[prost(int64, tag = "1")]
    pub size: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SessionLog {
    #[prost(int32, tag = "1")]
    pub status: i32,
}

impl Event {
    /// The event as a frame of the file.
    pub(super) fn frame(&self) -> Vec<u8> {
        let data = self.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(data.len() + 16);
        frame.extend_from_slice(&length);
        frame.extend_from_slice(&masked_crc(&length).to_le_bytes());
        frame.extend_from_slice(&data);
        frame.extend_from_slice(&masked_crc(&data).to_le_bytes());
        frame
    }

    /// The events of a file, up to the first frame that is cut or damaged.
    #[cfg(test)]
    pub(super) fn read_all(mut bytes: &[u8]) -> Vec<Event> {
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let mut events = Vec::new();
        while bytes.len() >= 12 {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            if word(&bytes[8..12]) != masked_crc(&bytes[..8]) || bytes.len() < 16 + length {
                break;
            }
            let data = &bytes[12..12 + length];
            if word(&bytes[12 + length..16 + length]) != masked_crc(data) {
                break;
            }
            events.push(Event::decode(data).unwrap());
            bytes = &bytes[16 + length..];
        }
        events
    }
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), masked so that the checksum of data that holds checksums stays
/// a good one.
fn masked_crc(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    let crc = bytes.iter().fold(!0u32, |crc, byte| {
        TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8)
    });
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// What eight steps of the division leave of each byte.
const fn table() -> [u32; 256] {
    let mut table = [0u32; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut rest = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            rest = (rest >> 1) ^ (0x82f6_3b78 & (rest & 1).wrapping_neg());
            bit += 1;
        }
        table[byte] = rest;
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        let plain = |bytes: &[u8]| masked_crc(bytes).wrapping_sub(0xa282_ead8).rotate_left(15);
        assert_eq!(plain(&[0; 32]), 0x8a91_36aa);
        assert_eq!(plain(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(plain(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(plain(b"123456789"), 0xe306_9283);
    }
}
