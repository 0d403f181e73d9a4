//! Copies beside the kernels: whoever comes next to one of their tensors waits, and nobody else does.
//!
//! On the emulated device every case runs twice, with copies as late and as early as they may be: late, a destination is NaN and
//! a source is read only when something waits, so that each wait that is missing changes a number here.

use glmtune::cuda;
use glmtune::ops;
use glmtune::tensor::{DType, Device, Tensor};

use super::{device, down, random, up};

const N: usize = 1000;

/// Runs `f` with late and with early copies where that can be chosen; fails when `f` leaves a copy nobody waits for.
fn whenever_they_land(f: impl Fn(Device)) {
    let Some(device) = device() else { return };
    #[cfg(feature = "emu")]
    for landing in [cuda::Landing::Early, cuda::Landing::Late] {
        cuda::land_copies(landing);
        f(device);
        assert_eq!(cuda::copies_under_way(), 0, "{landing:?}");
    }
    #[cfg(not(feature = "emu"))]
    f(device);
}

/// Copies under way, where that is known; otherwise `expected`.
fn under_way(_expected: usize) -> usize {
    #[cfg(feature = "emu")]
    return cuda::copies_under_way();
    #[cfg(not(feature = "emu"))]
    _expected
}

/// Copies land late from now on, where that can be chosen.
fn late() {
    #[cfg(feature = "emu")]
    cuda::land_copies(cuda::Landing::Late);
}

fn numbers(seed: u64) -> Tensor {
    random(DType::F32, [N], seed, 1.0)
}

fn pinned(device: Device, values: &Tensor) -> Tensor {
    let mut tensor = Tensor::zeros_pinned(device, values.dtype(), values.shape()).unwrap();
    tensor.copy_from(values).unwrap();
    tensor
}

fn empty(device: Device) -> Tensor {
    Tensor::zeros_on(device, DType::F32, [N]).unwrap()
}

fn gelu(x: &Tensor) -> Tensor {
    let mut y = empty(x.device());
    ops::gelu(x, &mut y).unwrap();
    down(&y)
}

#[track_caller]
fn assert_equal(got: &Tensor, want: &Tensor) {
    assert!(got.bytes() == want.bytes());
}

#[test]
fn what_reads_a_fetched_tensor_waits() {
    whenever_they_land(|device| {
        let values = numbers(1);
        let host = pinned(device, &values);
        let mut there = empty(device);
        ops::fetch(&host, &mut there).unwrap();
        assert_equal(&gelu(&there), &gelu(&up(device, &values)));
        // A download, a copy on the device, a store.
        there.zero().unwrap();
        ops::fetch(&host, &mut there).unwrap();
        assert_equal(&down(&there), &values);
        there.zero().unwrap();
        ops::fetch(&host, &mut there).unwrap();
        let mut other = empty(device);
        other.copy_from(&there).unwrap();
        assert_equal(&down(&other), &values);
        there.zero().unwrap();
        ops::fetch(&host, &mut there).unwrap();
        let mut back = pinned(device, &numbers(2));
        ops::store(&there, &mut back).unwrap();
        assert_equal(&back, &values);
    });
}

#[test]
fn what_writes_a_fetched_tensor_comes_after_the_copy() {
    whenever_they_land(|device| {
        let (a, b) = (numbers(1), numbers(2));
        let (host, other) = (pinned(device, &a), pinned(device, &b));
        let mut there = empty(device);
        let fetched = |there: &mut Tensor| ops::fetch(&host, there).unwrap();
        // A copy that nobody waited for has happened by then as well.
        let down = |tensor: &Tensor| {
            cuda::synchronize(0).unwrap();
            down(tensor)
        };
        fetched(&mut there);
        ops::gelu(&up(device, &b), &mut there).unwrap();
        assert_equal(&down(&there), &gelu(&up(device, &b)));
        fetched(&mut there);
        there.write(b.as_slice::<f32>()).unwrap();
        assert_equal(&down(&there), &b);
        fetched(&mut there);
        there.zero().unwrap();
        assert_equal(&down(&there), &Tensor::zeros(DType::F32, [N]));
        fetched(&mut there);
        there.copy_from(&up(device, &b)).unwrap();
        assert_equal(&down(&there), &b);
        fetched(&mut there);
        ops::fetch(&other, &mut there).unwrap();
        assert_equal(&down(&there), &b);
        fetched(&mut there);
        ops::fetch(&b, &mut there).unwrap();
        assert_equal(&down(&there), &b);
    });
}

#[test]
fn the_host_waits_for_what_is_stored() {
    whenever_they_land(|device| {
        let (values, mut host) = (numbers(1), pinned(device, &numbers(2)));
        let there = up(device, &values);
        ops::store(&there, &mut host).unwrap();
        assert_equal(&host, &values);
        // As an element, a clone, a copy.
        ops::store(&up(device, &numbers(3)), &mut host).unwrap();
        assert_equal(&host.clone(), &numbers(3));
        ops::store(&there, &mut host).unwrap();
        assert_equal(&host.to_device(Device::Cpu).unwrap(), &values);
        ops::store(&up(device, &numbers(3)), &mut host).unwrap();
        assert_equal(&down(&up(device, &host)), &numbers(3));
        ops::store(&there, &mut host).unwrap();
        host.arrive().unwrap();
        assert_equal(&host, &values);
        // To write it is to wait as well.
        ops::store(&there, &mut host).unwrap();
        host.as_mut_slice::<f32>()[0] = 7.0;
        assert_eq!(host.as_slice::<f32>()[0], 7.0);
        assert_eq!(host.as_slice::<f32>()[1..], values.as_slice::<f32>()[1..]);
    });
}

#[test]
fn the_source_of_a_copy_is_not_written_before_it_is_read() {
    whenever_they_land(|device| {
        let (a, b) = (numbers(1), numbers(2));
        let on_b = up(device, &b);
        let mut host = pinned(device, &b);
        let overwrite: [&dyn Fn(&mut Tensor); 6] = [
            &|there| ops::gelu(&on_b, there).unwrap(),
            &|there| there.zero().unwrap(),
            &|there| there.write(b.as_slice::<f32>()).unwrap(),
            &|there| there.copy_from(&on_b).unwrap(),
            &|there| ops::fetch(&pinned(device, &b), there).unwrap(),
            &|there| ops::fetch(&b, there).unwrap(),
        ];
        for overwrite in overwrite {
            let mut there = up(device, &a);
            ops::store(&there, &mut host).unwrap();
            overwrite(&mut there);
            assert_equal(&host, &a);
        }
        // By the host, and by a store from elsewhere.
        let overwrite: [&dyn Fn(&mut Tensor); 4] = [
            &|host| host.as_mut_slice::<f32>().fill(0.5),
            &|host| host.copy_from(&b).unwrap(),
            &|host| host.copy_from(&on_b).unwrap(),
            &|host| ops::store(&on_b, host).unwrap(),
        ];
        for overwrite in overwrite {
            let (mut host, mut there) = (pinned(device, &a), empty(device));
            ops::fetch(&host, &mut there).unwrap();
            overwrite(&mut host);
            assert_equal(&down(&there), &a);
        }
        // Ordinary memory has been read when the call returns.
        let (mut plain, mut there) = (a.clone(), empty(device));
        ops::fetch(&plain, &mut there).unwrap();
        plain.as_mut_slice::<f32>().fill(0.5);
        assert_equal(&down(&there), &a);
    });
}

#[test]
fn a_copy_follows_one_of_the_other_direction() {
    whenever_they_land(|device| {
        let values = numbers(1);
        // Down and up again, through one host tensor; up and down again, through one on the device.
        let (mut host, mut there) = (pinned(device, &numbers(2)), empty(device));
        let source = up(device, &values);
        ops::store(&source, &mut host).unwrap();
        ops::fetch(&host, &mut there).unwrap();
        assert_equal(&gelu(&there), &gelu(&up(device, &values)));
        let mut back = pinned(device, &numbers(3));
        let source = pinned(device, &numbers(4));
        ops::fetch(&source, &mut there).unwrap();
        ops::store(&there, &mut back).unwrap();
        assert_equal(&back, &numbers(4));
        // Two readers of one source; the last one's end is the end of both.
        let (mut first, mut second) = (empty(device), empty(device));
        let mut source = pinned(device, &values);
        ops::fetch(&source, &mut first).unwrap();
        ops::fetch(&source, &mut second).unwrap();
        source.as_mut_slice::<f32>().fill(0.5);
        assert_equal(&down(&first), &values);
        assert_equal(&down(&second), &values);
    });
}

#[test]
fn memory_is_freed_after_the_copies_in_it() {
    whenever_they_land(|device| {
        let values = numbers(1);
        let mut there = empty(device);
        let host = pinned(device, &values);
        ops::fetch(&host, &mut there).unwrap();
        drop(host);
        assert_equal(&down(&there), &values);
        let mut host = pinned(device, &numbers(2));
        ops::store(&there, &mut host).unwrap();
        drop(there);
        assert_equal(&host, &values);
        // The destinations.
        let mut there = empty(device);
        ops::fetch(&host, &mut there).unwrap();
        drop(there);
        ops::store(&up(device, &values), &mut host).unwrap();
        drop(host);
    });
}

#[test]
fn a_tensor_takes_its_copies_to_another_thread() {
    whenever_they_land(|device| {
        let values = numbers(1);
        let (mut host, mut there) = (pinned(device, &values), empty(device));
        ops::fetch(&host, &mut there).unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(|| assert_equal(&down(&there), &values))
                .join()
                .unwrap();
        });
        ops::store(&up(device, &numbers(2)), &mut host).unwrap();
        std::thread::spawn(move || assert_equal(&host, &numbers(2)))
            .join()
            .unwrap();
    });
}

/// The point of it all: what has nothing to do with a copy does not wait for it.
#[test]
fn nobody_else_waits() {
    let Some(device) = device() else { return };
    late();
    let values = numbers(1);
    let (host, mut there) = (pinned(device, &values), empty(device));
    ops::fetch(&host, &mut there).unwrap();
    gelu(&up(device, &values));
    // The host reads what is being fetched.
    assert_equal(&host, &values);
    assert_eq!(under_way(1), 1);
    // A kernel reads what is being stored.
    let mut back = pinned(device, &values);
    let source = up(device, &values);
    ops::store(&source, &mut back).unwrap();
    gelu(&source);
    drop(down(&source));
    assert_eq!(under_way(2), 2);
    drop((host, there, back));
    assert_eq!(under_way(0), 0);
}

#[test]
fn copies_are_counted_and_resized_tensors_copied_as_far_as_they_go() {
    whenever_they_land(|device| {
        let before = cuda::transfers();
        let values = numbers(1);
        let (mut host, mut there) = (pinned(device, &values), empty(device));
        host.resize([10]).unwrap();
        there.resize([2, 5]).unwrap();
        ops::fetch(&host, &mut there).unwrap();
        there.resize([N]).unwrap();
        let got = down(&there);
        assert_eq!(got.as_slice::<f32>()[..10], values.as_slice::<f32>()[..10]);
        assert!(got.as_slice::<f32>()[10..].iter().all(|x| x.to_bits() == 0));
        ops::fetch(&values, &mut there).unwrap();
        host.resize([0]).unwrap();
        there.resize([0]).unwrap();
        ops::fetch(&host, &mut there).unwrap();
        ops::store(&there, &mut host).unwrap();
        host.resize([7]).unwrap();
        there.resize([7]).unwrap();
        ops::store(&there, &mut host).unwrap();
        let after = cuda::transfers();
        assert_eq!(after.fetched - before.fetched, 4 * (10 + N as u64));
        assert_eq!(after.stored - before.stored, 4 * 7);
    });
}

#[test]
fn copies_that_do_not_fit_are_refused() {
    let Some(device) = device() else { return };
    let host = pinned(device, &numbers(1));
    let refused = |result: glmtune::error::Result<()>, says: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(says), "{message}");
    };
    let mut narrow = Tensor::zeros_on(device, DType::F16, [N]).unwrap();
    refused(
        ops::fetch(&host, &mut narrow),
        "fetch: found from Tensor(float32 [1000])",
    );
    let mut short = Tensor::zeros_on(device, DType::F32, [N - 1]).unwrap();
    refused(ops::fetch(&host, &mut short), "to Tensor(float32 [999])");
    refused(ops::store(&short, &mut host.clone()), "store: found from");
    refused(ops::fetch(&empty(device), &mut empty(device)), "from on the host");
    refused(ops::store(&empty(device), &mut empty(device)), "to on the host");
    refused(ops::store(&empty(device), &mut numbers(1)), "page-locked memory");
}

/// Some allocation fails; what is done about it is the caller's business, who can tell it from other errors.
#[cfg(feature = "emu")]
#[test]
fn allocations_fail_on_demand() {
    let device = Device::Cuda(0);
    let before = cuda::allocations();
    cuda::fail_allocation(2);
    let _first = empty(device);
    let error = Tensor::zeros_pinned(device, DType::F32, [N]).unwrap_err();
    assert!(error.is_out_of_memory());
    let said = "page-locked host memory: found a refusal of 0.0 MB more, expected enough of it; ";
    assert!(error.to_string().starts_with(said), "{error}");
    let _third = Tensor::zeros_pinned(device, DType::F32, [N]).unwrap();
    cuda::fail_allocation(1);
    let error = Tensor::zeros_on(device, DType::F32, [N]).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    assert!(
        error.to_string().starts_with("memory of device cuda:0: found "),
        "{error}"
    );
    assert_eq!(cuda::allocations() - before, 4);
    assert!(
        !Tensor::zeros_on(Device::Cuda(9), DType::F32, [1])
            .unwrap_err()
            .is_out_of_memory()
    );
}

#[test]
fn ranges_are_copied_and_the_rest_is_left() {
    whenever_they_land(|device| {
        let (a, b) = (numbers(1), numbers(2));
        let (host, mut back) = (pinned(device, &a), pinned(device, &b));
        let mut there = up(device, &b);
        ops::fetch_range(&host, 100..200, &mut there, 300).unwrap();
        ops::fetch_range(&a, 0..7, &mut there, 0).unwrap();
        ops::store_range(&there, 299..401, &mut back, 1).unwrap();
        let at = |t: &Tensor, range: std::ops::Range<usize>| t.as_slice::<f32>()[range].to_vec();
        assert_eq!(at(&back, 2..102), at(&a, 100..200));
        assert_eq!(at(&back, 102..103), at(&b, 400..401));
        assert_eq!(at(&back, 103..N), at(&b, 103..N));
        let there = down(&there);
        assert_eq!(at(&there, 0..7), at(&a, 0..7));
        assert_eq!(at(&there, 7..300), at(&b, 7..300));
        assert_eq!(at(&there, 300..400), at(&a, 100..200));
        assert_eq!(at(&there, 400..N), at(&b, 400..N));
        let mut there = empty(device);
        assert!(ops::fetch_range(&host, 0..10, &mut there, N - 9).is_err());
        assert!(ops::store_range(&there, N - 1..N + 1, &mut back, 0).is_err());
    });
}
