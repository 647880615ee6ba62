//! A path between two nodes: UDP packets that are let through, dropped, or held back as on a slow line.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often a path looks whether what it holds back is due.
const LOOK: Duration = Duration::from_millis(2);

/// How long a packet may be held back on a slow line; what would have to wait longer is dropped.
const HELD: Duration = Duration::from_millis(1_500);

/// What can be done to a path.
#[derive(Default)]
struct Controls {
    cut: AtomicBool,
    /// Bytes in a second and direction; 0: as fast as they come.
    rate: AtomicU64,
    /// The port of the node that lets others in.
    port: AtomicU16,
    over: AtomicBool,
    /// Packets of both directions that got through.
    passed: AtomicU64,
}

/// The way from one dialing node to one that lets it in.
pub(super) struct Path {
    controls: Arc<Controls>,
    address: SocketAddr,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Path {
    pub(super) fn new() -> Self {
        let socket = || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(LOOK)).unwrap();
            Arc::new(socket)
        };
        let (front, back) = (socket(), socket());
        let controls: Arc<Controls> = Arc::default();
        let address = front.local_addr().unwrap();
        let dialer: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
        let there = {
            let (front, back, controls, dialer) =
                (Arc::clone(&front), Arc::clone(&back), Arc::clone(&controls), Arc::clone(&dialer));
            std::thread::spawn(move || {
                carry(&front, &back, &controls, |from| {
                    *dialer.lock().unwrap() = Some(from);
                    Some(SocketAddr::from(([127, 0, 0, 1], controls.port.load(Ordering::Relaxed))))
                });
            })
        };
        let controls_back = Arc::clone(&controls);
        let back = std::thread::spawn(move || carry(&back, &front, &controls_back, |_| *dialer.lock().unwrap()));
        Self { controls, address, threads: vec![there, back] }
    }

    /// Where the dialing node believes the other to be.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the other really is.
    pub(super) fn lead_to(&self, port: u16) {
        self.controls.port.store(port, Ordering::Relaxed);
    }

    pub(super) fn cut(&self, cut: bool) {
        self.controls.cut.store(cut, Ordering::Relaxed);
    }

    /// Bytes in a second and direction; 0 for as many as come.
    pub(super) fn slow(&self, rate: u64) {
        self.controls.rate.store(rate, Ordering::Relaxed);
    }

    pub(super) fn passed(&self) -> u64 {
        self.controls.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.controls.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

fn carry(from: &UdpSocket, to: &UdpSocket, controls: &Controls, target: impl Fn(SocketAddr) -> Option<SocketAddr>) {
    let mut held: VecDeque<(Instant, Vec<u8>, SocketAddr)> = VecDeque::new();
    let mut free = Instant::now();
    let mut packet = vec![0; 65_536];
    while !controls.over.load(Ordering::Relaxed) {
        if let Ok((length, source)) = from.recv_from(&mut packet) {
            let (now, rate) = (Instant::now(), controls.rate.load(Ordering::Relaxed));
            let Some(target) = target(source).filter(|_| !controls.cut.load(Ordering::Relaxed)) else { continue };
            free = free.max(now);
            if rate == 0 {
                free = now;
            } else if free - now <= HELD {
                free += Duration::from_secs_f64(length as f64 / rate as f64);
            } else {
                continue;
            }
            held.push_back((free, packet[..length].to_vec(), target));
        }
        let now = Instant::now();
        while held.front().is_some_and(|(due, ..)| *due <= now) {
            let (_, packet, target) = held.pop_front().expect("looked at above");
            // A node that is down refuses: its packet is lost, as on a network.
            if to.send_to(&packet, target).is_ok() {
                controls.passed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
