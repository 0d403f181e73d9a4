//! The driver without a card: what it says, and, over a fake `libcuda.so.1` (`tests/fake_libcuda.cpp`), what it does.

use std::path::Path;
use std::process::Command;

use super::*;

fn card(capability: (u32, u32), driver_version: (u32, u32)) -> Description {
    Description {
        name: "Card".into(),
        capability,
        total_bytes: 8 << 30,
        driver_version,
        multiprocessors: 20,
    }
}

#[test]
fn cards_and_drivers_that_are_too_old_are_refused() {
    for (capability, driver) in [
        ((7, 5), (12, 0)),
        ((8, 6), (12, 2)),
        ((12, 0), (12, 8)),
        ((9, 0), (13, 1)),
    ] {
        assert_eq!(check(&card(capability, driver)), Ok(()));
    }
    for (capability, driver, says) in [
        ((6, 1), (12, 2), "Card of compute capability 6.1"),
        ((7, 0), (12, 2), "Card of compute capability 7.0"),
        ((12, 0), (12, 7), "Card with a driver for CUDA 12.7"),
    ] {
        match check(&card(capability, driver)) {
            Err(Failure::Unavailable { found, .. }) => assert_eq!(found, says),
            other => panic!("{other:?}"),
        }
    }
}

/// On every machine: a device, or one sentence. Never a panic.
#[test]
fn a_missing_device_is_an_answer() {
    let last = Driver::open(u8::MAX);
    assert!(matches!(last, Err(Failure::Unavailable { .. })), "{last:?}");
    match Driver::device_count() {
        Ok(count) => assert!(count > 0),
        Err(Failure::Unavailable { found, remedy, .. }) => assert!(!found.is_empty() && !remedy.is_empty()),
        Err(other) => panic!("{other:?}"),
    }
}

/// A process has one libcuda: each case is a process of its own, which runs the test below.
#[test]
fn over_a_fake_libcuda() {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("libcuda.so.1");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_libcuda.cpp");
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or("g++".into()));
    compiler.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-o"]);
    let compiled = compiler.arg(&library).arg(source).status().unwrap();
    assert!(compiled.success());

    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[], "works"),
        (&[("FAKE_CAPABILITY", "75")], "works"),
        (&[("FAKE_CAPABILITY", "100")], "works"),
        (&[("FAKE_REFUSE", "cubin")], "works"),
        (&[("FAKE_CAPABILITY", "120"), ("FAKE_VERSION", "12080")], "works"),
        (
            &[("FAKE_REFUSE", "all")],
            "machine code for sm_86: fake error 209; PTX for compute_80: fake error 218 (ptxas: no such machine); \
             Fake card has compute capability 8.6",
        ),
        (
            &[("FAKE_VERSION", "11080")],
            "found an NVIDIA driver for CUDA 11.8, expected driver 525 (CUDA 12.0) or newer",
        ),
        (
            &[("FAKE_CAPABILITY", "120")],
            "found Fake card with a driver for CUDA 12.2, expected driver 570 (CUDA 12.8) or newer",
        ),
        (
            &[("FAKE_CAPABILITY", "61")],
            "found Fake card of compute capability 6.1, expected 7.5 or newer",
        ),
        (&[("FAKE_INIT", "100")], "found an NVIDIA driver, but no card"),
        (
            &[("FAKE_INIT", "803")],
            "found an NVIDIA library and kernel module of different versions",
        ),
        (
            &[("FAKE_INIT", "3")],
            "CUDA_ERROR_NOT_INITIALIZED (3): start the driver: fake error 3",
        ),
    ];
    let (module, _) = module_path!()
        .split_once("::")
        .map_or(("", ""), |(_, rest)| (rest, ""));
    for (environment, expected) in cases {
        let run = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg(format!("{module}::on_a_fake_card"))
            .env("LD_LIBRARY_PATH", folder.path())
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout) + String::from_utf8_lossy(&run.stderr);
        assert!(
            run.status.success() && said.contains(&format!("fake card: {expected}")),
            "{environment:?}: {said}"
        );
    }
}

#[test]
#[ignore = "over_a_fake_libcuda runs it"]
fn on_a_fake_card() {
    match Driver::open(0) {
        Ok(driver) => {
            use_everything(driver);
            println!("fake card: works");
        }
        Err(Failure::Unavailable { found, expected, .. }) => {
            println!("fake card: found {found}, expected {expected}");
        }
        // What was being done comes first; the cases are told apart by the rest.
        Err(Failure::Call { code, what }) => match what.split_once(".cu: ") {
            Some((_, why)) => println!("fake card: {why}"),
            None => println!("fake card: {code}: {what}"),
        },
        Err(other) => panic!("{other:?}"),
    }
}

fn use_everything(driver: Driver) {
    assert_eq!(Driver::device_count(), Ok(1));
    assert!(matches!(Driver::open(1), Err(Failure::Unavailable { .. })));
    let described = driver.describe();
    assert_eq!(
        (described.name.as_str(), described.multiprocessors),
        ("Fake card", 20)
    );
    let (free, total) = driver.memory().unwrap();
    assert_eq!((free, total), (1 << 30, 1 << 30));

    // More than two large buffers, and an odd end; the source is overwritten as soon as the call returns.
    let bytes: Vec<u8> = (0..70_000_001u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let (a, b) = (
        driver.allocate(bytes.len()).unwrap(),
        driver.allocate(bytes.len()).unwrap(),
    );
    let mut source = bytes.clone();
    driver.upload(a, &source).unwrap();
    source.fill(7);
    driver.copy(b, a, bytes.len()).unwrap();
    driver.zero(a, 10).unwrap();
    let mut back = vec![0; bytes.len()];
    driver.download(b, &mut back).unwrap();
    assert!(back == bytes);
    driver.download(a, &mut back[..20]).unwrap();
    assert_eq!(back[..10], [0; 10]);
    assert_eq!(back[10..20], bytes[10..20]);
    // Sizes around those of the buffers.
    for size in [
        0,
        1,
        (64 << 10) - 1,
        64 << 10,
        (64 << 10) + 1,
        32 << 20,
        (32 << 20) + 1,
        64 << 20,
    ] {
        driver.upload(a, &bytes[5..][..size]).unwrap();
        let mut back = vec![0; size];
        driver.download(a, &mut back).unwrap();
        assert!(back == bytes[5..][..size], "{size}");
    }
    // More small ones under way than there are small buffers, from another thread.
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let mut small = [0u8; 1000];
            for i in 0..100 {
                small.fill(i);
                driver.upload(a + 1000 * u64::from(i), &small).unwrap();
            }
        });
        work.join().unwrap();
    });
    driver.download(a, &mut back[..100_000]).unwrap();
    assert!((0..100_000).all(|i| back[i] == (i / 1000) as u8));

    copies_run_beside_kernels(&driver, &bytes, a, b);

    let kernel = UNITS
        .iter()
        .flat_map(|unit| unit.choose(described.capability).kernels)
        .next();
    if let Some(kernel) = kernel {
        let begin = driver.record().unwrap();
        for shared in [0, 48 << 10, 64 << 10, 50 << 10, 99 << 10] {
            driver.zero(a, 4).unwrap();
            // SAFETY: the fake kernel reads one address and writes four bytes there.
            let launch = unsafe { driver.launch(kernel, [2, 3, 4], 64, shared, (&raw const a).cast(), 8) };
            assert_eq!(launch, Ok(()));
            let mut threads = [0; 4];
            driver.download(a, &mut threads).unwrap();
            assert_eq!(u32::from_ne_bytes(threads), 2 * 3 * 4 * 64);
        }
        // SAFETY: as above; the launch is refused.
        let launch = unsafe { driver.launch(kernel, [1; 3], 64, 100 << 10, (&raw const a).cast(), 8) };
        match launch {
            Err(Failure::Call { code, what }) => {
                assert_eq!(code, "CUDA_ERROR_INVALID_VALUE (1)");
                assert!(what.contains(kernel), "{what}");
            }
            other => panic!("{other:?}"),
        }
        let end = driver.record().unwrap();
        // Five times zero, launch, download.
        assert_eq!(driver.elapsed_ms(&begin, &end), Ok(15.0));
    }
    // SAFETY: nothing is launched.
    let launch = unsafe { driver.launch("no_such_kernel", [1; 3], 1, 0, (&raw const a).cast(), 8) };
    assert!(matches!(launch, Err(Failure::Call { .. })));

    let asked = 2 << 30;
    let refused = driver.allocate(asked);
    let free = total - 2 * bytes.len() as u64;
    let asked = asked as u64;
    assert_eq!(refused, Err(Failure::OutOfMemory { asked, free, total }));
    let nothing = driver.allocate(0).unwrap();
    for address in [a, b, nothing] {
        driver.free(address);
    }
    driver.synchronize().unwrap();
    assert_eq!(driver.memory().unwrap(), (total, total));
}

/// Each of three streams runs as late as it may: what does not wait for another one overtakes it.
fn copies_run_beside_kernels(driver: &Driver, bytes: &[u8], a: u64, b: u64) {
    const N: usize = 100_000;
    let host = driver.pin(N).unwrap();
    // SAFETY: N bytes, used when no copy is under way in them.
    let on_host = || unsafe { std::slice::from_raw_parts_mut(host as *mut u8, N) };
    let got = |at: u64| {
        let mut back = vec![0; N];
        driver.download(at, &mut back).unwrap();
        back
    };
    assert!(on_host().iter().all(|&byte| byte == 0));

    // A fetch comes after what was asked for before, and before what joins it.
    on_host().copy_from_slice(&bytes[..N]);
    driver.zero(a, N).unwrap();
    // SAFETY: both have N bytes, and nothing touches them before the fence.
    let fetched = unsafe { driver.fetch(a, host, N, &[]) }.unwrap();
    driver.join(&fetched).unwrap();
    driver.copy(b, a, N).unwrap();
    assert!(got(b) == bytes[..N]);

    // A store too; the host waits for it.
    driver.upload(a, &bytes[5..][..N]).unwrap();
    // SAFETY: as above.
    let stored = unsafe { driver.store(host, a, N, &[]) }.unwrap();
    driver.wait(&stored).unwrap();
    assert!(*on_host() == bytes[5..][..N]);

    // Down and up again; nobody waits but the second copy.
    driver.upload(a, &bytes[7..][..N]).unwrap();
    // SAFETY: as above.
    let stored = unsafe { driver.store(host, a, N, &[]) }.unwrap();
    // SAFETY: as above; the fetch itself waits for the store.
    let fetched = unsafe { driver.fetch(b, host, N, &[&stored]) }.unwrap();
    // The fences of what is under way may go.
    drop(stored);
    driver.join(&fetched).unwrap();
    drop(fetched);
    assert!(got(b) == bytes[7..][..N]);

    // What nobody waits for has not happened, until the device is waited for as a whole.
    on_host().fill(1);
    // SAFETY: as above.
    let late = unsafe { driver.fetch(b, host, N, &[]) }.unwrap();
    assert!(got(b) == bytes[7..][..N]);
    driver.synchronize().unwrap();
    assert!(got(b) == [1; N]);
    driver.wait(&late).unwrap();

    // Through the staging buffers, in more parts than there are; the source is overwritten at once.
    let mut source = bytes.to_vec();
    let fetched = driver.fetch_staged(b, &source, &[]).unwrap();
    source.fill(7);
    driver.join(&fetched).unwrap();
    let mut back = vec![0; bytes.len()];
    driver.download(b, &mut back).unwrap();
    assert!(back == bytes);

    // What the driver refuses is an error, and the copies go on.
    // SAFETY: refused.
    let refused = unsafe { driver.fetch(1, host, N, &[]) };
    assert!(matches!(refused, Err(Failure::Call { .. })), "{refused:?}");
    driver.unpin(host);
    let asked = 2 << 30;
    let refused = driver.pin(asked);
    let asked = asked as u64;
    assert_eq!(refused, Err(Failure::OutOfPinned { asked }));
}
