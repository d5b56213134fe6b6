//! Two network namespaces joined by a veth pair, a workload in each, and the proxy serving both: sockets, TLS and
//! namespaces are real, only the kernel maps are a map in memory. Nothing has a name, so nothing is left behind.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use weft_agent::identity::credentials::KeyRequest;
use weft_agent::identity::{Credentials, Live, Roots, SpiffeId};
use weft_agent::netns::Netns;
use weft_agent::proxy::drain::{Trigger, Watch, channel};
use weft_agent::proxy::sock::to_map;
use weft_agent::proxy::{
    Access, ConnectionEvent, Datapath, Happening, Pod, PodProxy, Problem, Proxy, Recorder, Settings, Verdict,
    View, Workload,
};
use weft_datapath::abi::OrigDst;

pub(crate) const OUTBOUND: u16 = 15001;
pub(crate) const TUNNEL: u16 = 15008;

/// The kernel's maps, in memory.
#[derive(Default)]
pub(crate) struct Maps {
    pub(crate) marked: AtomicUsize,
    pub(crate) orig: Mutex<HashMap<(u64, SocketAddr), OrigDst>>,
    pub(crate) legs: Mutex<HashMap<(u64, SocketAddr), SocketAddr>>,
}

impl Datapath for Maps {
    fn mark(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        assert!(socket.as_raw_fd() >= 0);
        self.marked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn take_orig_dst(&self, cookie: u64, app: SocketAddr) -> io::Result<Option<OrigDst>> {
        Ok(self.orig.lock().unwrap().remove(&(cookie, app)))
    }

    fn put_leg(&self, cookie: u64, local: SocketAddr, client: SocketAddr) -> io::Result<()> {
        assert_eq!(self.legs.lock().unwrap().insert((cookie, local), client), None, "a leg was overwritten");
        Ok(())
    }

    fn del_leg(&self, cookie: u64, local: SocketAddr) {
        assert!(self.legs.lock().unwrap().remove(&(cookie, local)).is_some());
    }
}

/// Everybody may do everything except what is listed.
#[derive(Clone, Default)]
pub(crate) struct Knowledge {
    pub(crate) workloads: Vec<Arc<Workload>>,
    pub(crate) denied: Vec<(SpiffeId, u16)>,
    /// Ports that nobody's egress policy allows.
    pub(crate) kept_in: Vec<u16>,
}

impl View for Knowledge {
    fn workload(&self, addr: IpAddr) -> Option<Arc<Workload>> {
        self.workloads.iter().find(|workload| workload.addresses.contains(&addr)).cloned()
    }

    fn check(&self, access: &Access<'_>) -> Verdict {
        let denied = self.denied.contains(&(access.source.clone(), access.port));
        let known = self.workloads.iter().any(|workload| {
            workload.addresses.contains(&access.source_addr) && workload.identity == *access.source
        });
        Verdict { allowed: known && !denied, by: if denied { "rule 7" } else { "default" }.into() }
    }

    fn check_egress(&self, access: &Access<'_>) -> Verdict {
        Verdict { allowed: !self.kept_in.contains(&access.port), by: "rule 8".into() }
    }
}

/// All records, for assertions.
#[derive(Default)]
pub(crate) struct Records {
    pub(crate) events: Mutex<Vec<ConnectionEvent>>,
    pub(crate) problems: Mutex<Vec<Problem>>,
    pub(crate) handshakes: AtomicUsize,
}

impl Recorder for Records {
    fn connection(&self, event: &ConnectionEvent) {
        self.events.lock().unwrap().push(event.clone());
    }

    fn problem(&self, problem: Problem) {
        self.problems.lock().unwrap().push(problem);
    }

    fn handshake(&self, _: Duration) {
        self.handshakes.fetch_add(1, Ordering::Relaxed);
    }
}

impl Records {
    pub(crate) fn refusals(&self) -> Vec<ConnectionEvent> {
        let events = self.events.lock().unwrap();
        events.iter().filter(|event| matches!(event.happening, Happening::Refused(_))).cloned().collect()
    }
}

/// A certificate authority for one test.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) roots: Arc<ArcSwap<Roots>>,
}

impl Ca {
    pub(crate) fn new() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "test root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        let roots = Roots::new(vec![root.der().clone()]).unwrap();
        Ca { issuer: Issuer::new(params, key), roots: Arc::new(ArcSwap::from_pointee(roots)) }
    }

    pub(crate) fn issue(&self, identity: &SpiffeId, life: Duration) -> Credentials {
        let request = KeyRequest::new(identity.as_str()).unwrap();
        let mut csr = CertificateSigningRequestParams::from_pem(&request.csr_pem().unwrap()).unwrap();
        csr.params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        csr.params.not_after = (SystemTime::now() + life).into();
        let certificate = csr.signed_by(&self.issuer).unwrap();
        Credentials::new(&request, vec![certificate.der().clone()], &self.roots.load(), SystemTime::now())
            .unwrap()
    }

    pub(crate) fn live(&self, identity: &SpiffeId, life: Duration) -> Arc<Live> {
        Arc::new(Live::new(identity.clone(), Some(Arc::new(self.issue(identity, life))), self.roots.clone()))
    }
}

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) struct Host {
    pub(crate) netns: Arc<Netns>,
    pub(crate) workload: Arc<Workload>,
    pub(crate) live: Arc<Live>,
    pub(crate) proxy: Option<PodProxy>,
}

impl Host {
    pub(crate) fn v4(&self) -> IpAddr {
        self.workload.addresses[0]
    }

    pub(crate) fn v6(&self) -> IpAddr {
        self.workload.addresses[1]
    }

    /// A server of the application.
    pub(crate) fn listen(&self, addr: SocketAddr) -> TcpListener {
        let socket = self.netns.run(|| socket(addr)).unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(addr).unwrap();
        socket.listen(1024).unwrap()
    }
}

fn socket(addr: SocketAddr) -> TcpSocket {
    if addr.is_ipv4() { TcpSocket::new_v4().unwrap() } else { TcpSocket::new_v6().unwrap() }
}

pub(crate) struct World {
    pub(crate) client: Host,
    pub(crate) server: Host,
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) maps: Arc<Maps>,
    pub(crate) records: Arc<Records>,
    pub(crate) ca: Ca,
    pub(crate) knowledge: watch::Sender<Arc<dyn View>>,
    pub(crate) drain: Watch,
    pub(crate) trigger: Option<Trigger>,
}

impl World {
    pub(crate) async fn new() -> World {
        World::with(Settings::default()).await
    }

    pub(crate) async fn with(settings: Settings) -> World {
        let (a, b) = pair();
        let ca = Ca::new();
        let mut client = host(&ca, a, "client", ["10.99.0.1", "fd99::1"]);
        let mut server = host(&ca, b, "server", ["10.99.0.2", "fd99::2"]);
        let knowledge = Knowledge {
            workloads: vec![client.workload.clone(), server.workload.clone()],
            denied: Vec::new(),
            kept_in: Vec::new(),
        };
        let (sender, view) = watch::channel(Arc::new(knowledge) as Arc<dyn View>);
        let (maps, records) = (Arc::new(Maps::default()), Arc::new(Records::default()));
        let (trigger, drain) = channel();
        let proxy = Proxy::new(settings, maps.clone(), view, records.clone());
        for host in [&mut client, &mut server] {
            let pod = Pod::new(host.workload.clone(), host.netns.clone(), host.live.clone());
            let mut served = proxy.serve(pod, drain.clone());
            tokio::time::timeout(Duration::from_secs(5), served.ready()).await.expect("listeners come up");
            host.proxy = Some(served);
        }
        World { client, server, proxy, maps, records, ca, knowledge: sender, drain, trigger: Some(trigger) }
    }

    /// What the agent knows, to be changed and given to [`World::publish`].
    pub(crate) fn knowledge(&self) -> Knowledge {
        Knowledge {
            workloads: vec![self.client.workload.clone(), self.server.workload.clone()],
            denied: Vec::new(),
            kept_in: Vec::new(),
        }
    }

    /// As the agent does with a new snapshot; returns how many connections were cut.
    pub(crate) fn publish(&self, knowledge: Knowledge) -> usize {
        let view: Arc<dyn View> = Arc::new(knowledge);
        self.knowledge.send_replace(view.clone());
        self.proxy.registry().recheck(&*view)
    }

    /// A connection of the client's application to `target`, as the connect hook makes it: redirected to loopback,
    /// with the original destination noted.
    pub(crate) async fn connect(&self, target: SocketAddr) -> io::Result<TcpStream> {
        let loopback: IpAddr =
            if target.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
        let agent = SocketAddr::new(loopback, OUTBOUND);
        let socket = self.client.netns.run(|| socket(agent))?;
        socket.bind(SocketAddr::new(loopback, 0))?;
        let cookie = self.client.netns.cookie();
        let orig = OrigDst {
            netns_cookie: cookie,
            dst: to_map(target.ip()),
            backend: to_map(target.ip()),
            dst_port: target.port(),
            backend_port: target.port(),
            ..OrigDst::default()
        };
        self.maps.orig.lock().unwrap().insert((cookie, socket.local_addr()?), orig);
        socket.connect(agent).await
    }

    /// Waits until nothing is registered any more.
    pub(crate) async fn settle(&self) {
        for _ in 0..1000 {
            if self.proxy.registry().list().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("connections stay: {:?}", self.proxy.registry().list());
    }
}

fn host(ca: &Ca, netns: Netns, name: &str, addresses: [&str; 2]) -> Host {
    let identity: SpiffeId = format!("spiffe://cluster.local/ns/test/sa/{name}").parse().unwrap();
    let workload = Workload {
        namespace: "test".into(),
        name: name.into(),
        service: name.into(),
        identity: identity.clone(),
        addresses: addresses.map(|addr| addr.parse().unwrap()).to_vec(),
    };
    Host { netns: Arc::new(netns), workload: Arc::new(workload), live: ca.live(&identity, HOUR), proxy: None }
}

/// A new network namespace, loopback down as the kernel makes it; it lives as long as somebody holds it.
pub(crate) fn namespace() -> Netns {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
        Netns::open(&PathBuf::from("/proc/thread-self/ns/net")).unwrap()
    })
    .join()
    .unwrap()
}

fn pair() -> (Netns, Netns) {
    let (a, b) = (namespace(), namespace());
    // iproute2 takes a path for a namespace: that of a thread that sits in it while the other end is made.
    let (path, told) = std::sync::mpsc::channel();
    let (done, finish) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let b = &b;
        scope.spawn(move || {
            b.run(|| {
                let tid = nix::unistd::gettid();
                path.send(format!("/proc/{}/task/{tid}/ns/net", std::process::id())).unwrap();
                let _ = finish.recv();
            })
            .unwrap();
        });
        let other = told.recv().unwrap();
        a.run(|| {
            ip("link set lo up");
            ip(&format!("link add eth0 type veth peer name eth0 netns {other}"));
            ip("addr add 10.99.0.1/24 dev eth0");
            ip("addr add fd99::1/64 dev eth0 nodad");
            ip("link set eth0 up");
        })
        .unwrap();
        b.run(|| {
            ip("link set lo up");
            ip("addr add 10.99.0.2/24 dev eth0");
            ip("addr add fd99::2/64 dev eth0 nodad");
            ip("link set eth0 up");
        })
        .unwrap();
        drop(done);
    });
    (a, b)
}

/// Runs iproute2 in the calling thread's namespace.
pub(crate) fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}
