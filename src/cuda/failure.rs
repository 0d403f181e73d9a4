//! What a driver can answer instead of doing what it was asked.

/// The result of a driver call.
pub(super) type Result<T> = std::result::Result<T, Failure>;

/// A driver call that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    not(any(feature = "cuda", feature = "emu")),
    expect(dead_code, reason = "without CUDA there is no call that could fail")
)]
pub(super) enum Failure {
    /// There is no device to compute on.
    Unavailable {
        /// What was found instead of it.
        found: String,
        /// What is needed.
        expected: String,
        /// The one thing to do.
        remedy: String,
    },
    /// The device has not enough memory left.
    OutOfMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes free.
        free: u64,
        /// Bytes there are.
        total: u64,
    },
    /// The system does not let the program lock so much host memory.
    OutOfPinned {
        /// Bytes asked for.
        asked: u64,
    },
    /// A call failed.
    Call {
        /// The code's name and number, as `CUDA_ERROR_ILLEGAL_ADDRESS (700)`.
        code: String,
        /// What was being done, or what the driver says of it.
        what: String,
    },
}
