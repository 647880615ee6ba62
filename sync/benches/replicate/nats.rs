//! The same through NATS JetStream on one server, by its own text protocol: a key's subject in a bucket's stream, kept in a
//! file, acknowledged, and seen by a second connection. No TLS, no second server: less work than ours.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use hdrhistogram::Histogram;

use super::{PATIENCE, VALUE_BYTES, WRITES, key, record, shown};

struct Server {
    child: Child,
    address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self(BufReader::new(stream));
        client.send("CONNECT {\"verbose\":false,\"pedantic\":false}\r\nPING\r\n");
        while client.line() != "PONG" {}
        client
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).unwrap() > 0, "the server ended");
        line.trim_end().to_owned()
    }

    /// The next message's text.
    fn message(&mut self) -> String {
        loop {
            let line = self.line();
            if line == "PING" {
                self.send("PONG\r\n");
            }
            let Some(head) = line.strip_prefix("MSG ") else { continue };
            let length: usize = head.rsplit(' ').next().unwrap().parse().unwrap();
            let mut body = vec![0; length + 2];
            self.0.read_exact(&mut body).unwrap();
            body.truncate(length);
            return String::from_utf8(body).unwrap();
        }
    }

    fn publish(&mut self, subject: &str, body: &str) {
        self.send(&format!("PUB {subject} answers {}\r\n{body}\r\n", body.len()));
    }
}

fn start() -> Option<Server> {
    let program = std::env::var_os("SELVAGE_NATS_SERVER").unwrap_or_else(|| "nats-server".into());
    let directory = tempfile::tempdir().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = Command::new(&program);
    command.args(["-a", "127.0.0.1", "-js", "-p", &address.port().to_string(), "-sd"]).arg(directory.path());
    let spawned = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(child) = spawned else {
        println!("nats: NOT MEASURED: {} can't be started; see the bench's first lines", program.display());
        return None;
    };
    let server = Server { child, address, _directory: directory };
    let started = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(started.elapsed() < PATIENCE, "nats-server does not listen");
        std::thread::yield_now();
    }
    Some(server)
}

pub(super) fn measure() {
    let Some(server) = start() else { return };
    let mut writer = Client::connect(server.address);
    writer.send("SUB answers 1\r\n");
    let bucket =
        r#"{"name":"KV_bench","subjects":["$KV.bench.>"],"storage":"file","max_msgs_per_subject":1,"num_replicas":1}"#;
    writer.publish("$JS.API.STREAM.CREATE.KV_bench", bucket);
    let made = writer.message();
    assert!(!made.contains("\"error\""), "{made}");
    let mut reader = Client::connect(server.address);
    reader.send("SUB $KV.bench.> 2\r\nPING\r\n");
    while reader.line() != "PONG" {}
    let value = "7".repeat(VALUE_BYTES);
    let (mut seen, mut kept) = (Histogram::<u64>::new(3).unwrap(), Histogram::<u64>::new(3).unwrap());
    for number in 0..WRITES {
        let start = Instant::now();
        writer.publish(&format!("$KV.bench.{}", key(number)), &value);
        let _value = reader.message();
        record(&mut seen, start);
        let answer = writer.message();
        assert!(answer.contains("\"seq\""), "{answer}");
        record(&mut kept, start);
    }
    println!(
        "nats, one server, no TLS: put until seen by a subscriber {}; acknowledged {} (not on the disk by then: it syncs \
         every 2 minutes)",
        shown(&seen),
        shown(&kept)
    );
}
