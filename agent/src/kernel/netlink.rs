//! The few netlink requests the agent makes: interfaces, addresses, namespace ids, and destroying sockets.
//!
//! A socket speaks for the network namespace it was opened in. Layouts: `linux/netlink.h`, `linux/rtnetlink.h`,
//! `linux/if_addr.h`, `linux/net_namespace.h`, `linux/inet_diag.h`; integers are in host order unless said otherwise.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// Large enough for any single datagram of a dump; the kernel sizes them by the reader's buffer, up to 32 KiB.
const BUFFER: usize = 64 * 1024;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// A netlink socket.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    /// Such as `veth`.
    pub(crate) kind: String,
    /// The interface at the other end.
    pub(crate) peer: Option<u32>,
    /// The namespace of the other end, as this namespace numbers it; `None` when it is this one.
    pub(crate) peer_netns: Option<i32>,
}

impl Netlink {
    /// For interfaces and addresses.
    pub(crate) fn route() -> io::Result<Netlink> {
        Netlink::open(SockProtocol::NetlinkRoute)
    }

    /// For sockets.
    pub(crate) fn sock_diag() -> io::Result<Netlink> {
        Netlink::open(SockProtocol::NetlinkSockDiag)
    }

    fn open(protocol: SockProtocol) -> io::Result<Netlink> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        // The kernel answers within the request; should it ever not, an error beats a stuck agent.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(5, 0))?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// All interfaces.
    pub(crate) fn links(&mut self) -> io::Result<Vec<Link>> {
        let body = [0; 16]; // struct ifinfomsg: any family, any interface
        let flags = libc::NLM_F_DUMP as u16;
        Ok(self.request(libc::RTM_GETLINK, flags, &body)?.iter().filter_map(|body| link(body)).collect())
    }

    /// All addresses, with the interfaces that carry them.
    pub(crate) fn addresses(&mut self) -> io::Result<Vec<(u32, IpAddr)>> {
        let body = [0; 8]; // struct ifaddrmsg: any family, any interface
        let flags = libc::NLM_F_DUMP as u16;
        Ok(self.request(libc::RTM_GETADDR, flags, &body)?.iter().filter_map(|body| address(body)).collect())
    }

    /// How this namespace numbers another one; `None` when it has no number for it.
    pub(crate) fn netns_id(&mut self, netns: &File) -> io::Result<Option<i32>> {
        const NETNSA_NSID: u16 = 1;
        const NETNSA_FD: u16 = 3;
        let mut body = vec![0; 4]; // struct rtgenmsg, padded
        body.extend(8_u16.to_ne_bytes());
        body.extend(NETNSA_FD.to_ne_bytes());
        body.extend(netns.as_raw_fd().to_ne_bytes());
        let answer = self.request(libc::RTM_GETNSID, 0, &body)?;
        let id = answer.iter().find_map(|body| {
            attributes(body.get(4..)?)
                .find(|(kind, _)| *kind == NETNSA_NSID)
                .and_then(|(_, value)| number(value))
        });
        Ok(id.map(|id| id as i32).filter(|id| *id >= 0))
    }

    /// Destroys the TCP connection with these ends; `false` when there is none. Readers and writers get ECONNABORTED,
    /// the peer a reset.
    ///
    /// Where no connection has these ends the kernel takes the listener on the local one, so what it found is looked at
    /// first and then named by its cookie.
    pub(crate) fn destroy(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        const STATE: usize = 1; // of struct inet_diag_msg, as is the cookie
        const COOKIE: std::ops::Range<usize> = 44..52;
        const TCP_LISTEN: u8 = 10;
        let gone = |error: io::Error| match error.raw_os_error() {
            // No longer a full socket, which kernels before 5.19 do not destroy (TIME_WAIT): nobody holds it any more.
            Some(libc::ENOENT | libc::EOPNOTSUPP) => Ok(false),
            _ => Err(error),
        };
        let found = match self.request(SOCK_DIAG_BY_FAMILY, 0, &diag_request(local, remote, &[0xff; 8])) {
            Ok(found) => found,
            Err(error) => return gone(error),
        };
        let Some(cookie) =
            found.first().filter(|body| body[STATE] != TCP_LISTEN).and_then(|body| body.get(COOKIE))
        else {
            return Ok(false);
        };
        let request = diag_request(local, remote, cookie);
        self.request(SOCK_DESTROY, libc::NLM_F_ACK as u16, &request).map_or_else(gone, |_| Ok(true))
    }

    /// Can this kernel destroy sockets (CONFIG_INET_DIAG_DESTROY)? Asked about a connection that cannot exist.
    pub(crate) fn destroys(&mut self) -> io::Result<bool> {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let asked =
            self.request(SOCK_DESTROY, libc::NLM_F_ACK as u16, &diag_request(nowhere, nowhere, &[0; 8]));
        match asked.err().and_then(|error| error.raw_os_error()) {
            Some(libc::EOPNOTSUPP) => Ok(false),
            Some(libc::ENOENT) => Ok(true),
            other => Err(io::Error::from_raw_os_error(other.unwrap_or(libc::EIO))),
        }
    }

    /// Puts a program at a place of the interface's clsact qdisc, which is made where there is none. A filter of ours that
    /// is there already changes its program at once; no packet sees neither.
    pub(crate) fn put_filter(&mut self, filter: &Filter, program: BorrowedFd<'_>) -> io::Result<()> {
        let (create, ack) = (libc::NLM_F_CREATE as u16, libc::NLM_F_ACK as u16);
        let qdisc = traffic_message(filter.ifindex, CLSACT_HANDLE, CLSACT, 0, "clsact", &[]);
        let made = self.request(libc::RTM_NEWQDISC, create | libc::NLM_F_EXCL as u16 | ack, &qdisc);
        if let Err(error) = made
            && error.raw_os_error() != Some(libc::EEXIST)
        {
            return Err(error);
        }
        let mut options = Vec::new();
        put_attribute(&mut options, TCA_BPF_FD, &(program.as_raw_fd()).to_ne_bytes());
        put_attribute(&mut options, TCA_BPF_NAME, format!("{}\0", filter.name).as_bytes());
        put_attribute(&mut options, TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes());
        self.request(libc::RTM_NEWTFILTER, create | ack, &filter.message(&options)).map(drop)
    }

    /// The number of the program that a filter of ours runs; `None` when there is no such filter.
    pub(crate) fn filter_program(&mut self, filter: &Filter) -> io::Result<Option<u32>> {
        let flags = libc::NLM_F_DUMP as u16;
        let body = traffic_message(filter.ifindex, 0, filter.parent, 0, "", &[]);
        let found = match self.request(libc::RTM_GETTFILTER, flags, &body) {
            Err(error) if is_gone(&error) => return Ok(None),
            found => found?,
        };
        Ok(found.iter().find_map(|body| filter.program_in(body)))
    }

    /// Removes a filter of ours; `false` when there is none, or no such interface.
    pub(crate) fn remove_filter(&mut self, filter: &Filter) -> io::Result<bool> {
        // Somebody else's filter at the same place is not ours to remove.
        if self.filter_program(filter)?.is_none() {
            return Ok(false);
        }
        match self.request(libc::RTM_DELTFILTER, libc::NLM_F_ACK as u16, &filter.message(&[])) {
            Err(error) if is_gone(&error) => Ok(false),
            removed => removed.map(|_| true),
        }
    }

    /// Removes the interface's clsact qdisc, unless a filter is on it.
    pub(crate) fn remove_idle_qdisc(&mut self, ifindex: u32) -> io::Result<()> {
        for side in [INGRESS, EGRESS] {
            let body = traffic_message(ifindex, 0, side, 0, "", &[]);
            match self.request(libc::RTM_GETTFILTER, libc::NLM_F_DUMP as u16, &body) {
                Err(error) if !is_gone(&error) => return Err(error),
                Ok(filters) if filters.is_empty() => {}
                _ => return Ok(()),
            }
        }
        // With its kind, so that another qdisc at the same place is refused.
        let qdisc = traffic_message(ifindex, CLSACT_HANDLE, CLSACT, 0, "clsact", &[]);
        match self.request(libc::RTM_DELQDISC, libc::NLM_F_ACK as u16, &qdisc) {
            Err(error) if is_gone(&error) => Ok(()),
            removed => removed.map(drop),
        }
    }

    /// Sends a request and gathers the bodies of its answers.
    fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;

        let mut bodies = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, flags, sequence, body) in messages(&buffer[..length]) {
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    NLMSG_DONE => return Ok(bodies),
                    NLMSG_ERROR => {
                        let code = number(body).unwrap_or_default() as i32;
                        return if code == 0 { Ok(bodies) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => {
                        bodies.push(body.to_vec());
                        if flags & libc::NLM_F_MULTI as u16 == 0 && message_wants_no_ack(&message) {
                            return Ok(bodies);
                        }
                    }
                }
            }
        }
    }
}

/// A program's place in the traffic control of an interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filter {
    pub(crate) ifindex: u32,
    /// [`INGRESS`] or [`EGRESS`].
    pub(crate) parent: u32,
    /// The program's.
    pub(crate) name: &'static str,
}

/// The sides of a clsact qdisc (`linux/pkt_sched.h`).
pub(crate) const INGRESS: u32 = 0xffff_fff2;
pub(crate) const EGRESS: u32 = 0xffff_fff3;
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// Priority (before those that plugins of the container network choose for themselves at the end of the range) and
/// handle of weft's filters; together with the name they say that a filter is weft's.
const PRIORITY: u32 = 15008;
const HANDLE: u32 = 0x3a90;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
// linux/pkt_cls.h
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const DIRECT_ACTION: u32 = 1;

impl Filter {
    fn message(&self, options: &[u8]) -> Vec<u8> {
        traffic_message(self.ifindex, HANDLE, self.parent, filter_info(), "bpf", options)
    }

    /// The program's number, if this filter is the one in the message.
    fn program_in(&self, body: &[u8]) -> Option<u32> {
        let is = |offset: usize, wanted| body.get(offset..).and_then(number) == Some(wanted);
        if !(is(4, self.ifindex) && is(8, HANDLE) && is(16, filter_info())) {
            return None;
        }
        let (_, options) = attributes(body.get(20..)?).find(|(kind, _)| *kind == TCA_OPTIONS)?;
        let (_, name) = attributes(options).find(|(kind, _)| *kind == TCA_BPF_NAME)?;
        let (_, id) = attributes(options).find(|(kind, _)| *kind == TCA_BPF_ID)?;
        if name.strip_suffix(b"\0") == Some(self.name.as_bytes()) { number(id) } else { None }
    }
}

/// `tcm_info` of a filter: priority, and the protocol (all) in network order.
fn filter_info() -> u32 {
    PRIORITY << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

/// `struct tcmsg` with a kind and options.
fn traffic_message(ifindex: u32, handle: u32, parent: u32, info: u32, kind: &str, options: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 4]; // any family, padded
    for word in [ifindex, handle, parent, info] {
        body.extend(word.to_ne_bytes());
    }
    if !kind.is_empty() {
        put_attribute(&mut body, TCA_KIND, format!("{kind}\0").as_bytes());
    }
    if !options.is_empty() {
        put_attribute(&mut body, TCA_OPTIONS, options);
    }
    body
}

fn put_attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend(((4 + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// No such filter, qdisc or interface.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL))
}

fn message_wants_no_ack(message: &[u8]) -> bool {
    u16::from_ne_bytes([message[6], message[7]]) & libc::NLM_F_ACK as u16 == 0
}

/// The messages of a datagram: kind, flags, sequence, body.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let length = number(datagram)? as usize;
        let message = datagram.get(..length)?;
        let body = message.get(HEADER..)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let flags = u16::from_ne_bytes([message[6], message[7]]);
        Some((kind, flags, number(&message[8..])?, body))
    })
}

/// The attributes in a message's body: kind (without flags), value.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const FLAGS: u16 = 0xc000;
    std::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let length = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([header[2], header[3]]) & !FLAGS, value))
    })
}

fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn link(body: &[u8]) -> Option<Link> {
    const INFO_KIND: u16 = 1;
    let mut link = Link { index: number(body.get(4..)?)?, ..Link::default() };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            libc::IFLA_LINK => link.peer = number(value),
            libc::IFLA_LINK_NETNSID => link.peer_netns = number(value).map(|id| id as i32),
            libc::IFLA_LINKINFO => {
                if let Some((_, kind)) = attributes(value).find(|(kind, _)| *kind == INFO_KIND) {
                    link.kind = String::from_utf8_lossy(kind).trim_end_matches('\0').into();
                }
            }
            _ => {}
        }
    }
    Some(link)
}

fn address(body: &[u8]) -> Option<(u32, IpAddr)> {
    let index = number(body.get(4..)?)?;
    let mut found = None;
    for (kind, value) in attributes(body.get(8..)?) {
        // IFA_LOCAL is the interface's own where IFA_ADDRESS is that of the other end; IPv6 mostly has the latter only.
        if kind == libc::IFA_LOCAL || (kind == libc::IFA_ADDRESS && found.is_none()) {
            found = ip(value);
        }
    }
    Some((index, found?))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| Ipv6Addr::from(v6).into())
}

/// `struct inet_diag_req_v2` for one TCP socket. The lookup of an IPv4 pair also finds IPv6 sockets with mapped addresses.
fn diag_request(local: SocketAddr, remote: SocketAddr, cookie: &[u8]) -> Vec<u8> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8;
    let mut request = vec![family, libc::IPPROTO_TCP as u8, 0, 0];
    request.extend(u32::MAX.to_ne_bytes()); // in any state
    request.extend(local.port().to_be_bytes());
    request.extend(remote.port().to_be_bytes());
    for end in [local, remote] {
        let mut field = [0; 16];
        match end.ip() {
            IpAddr::V4(v4) => field[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => field = v6.octets(),
        }
        request.extend(field);
    }
    request.extend([0; 4]); // on any interface
    request.extend(cookie); // all ones: whichever it has
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_loopback_is_found() {
        let mut netlink = Netlink::route().unwrap();
        let links = netlink.links().unwrap();
        let loopback = links.iter().find(|link| link.index == 1).unwrap();
        assert_eq!((loopback.peer, loopback.peer_netns), (None, None));
        assert!(
            netlink
                .addresses()
                .unwrap()
                .iter()
                .all(|(index, _)| links.iter().any(|link| link.index == *index))
        );
    }

    #[test]
    fn truncated_messages_end_the_walk() {
        let attribute = [8, 0, 1, 0x80, 1, 2, 3, 4];
        assert_eq!(attributes(&attribute).collect::<Vec<_>>(), [(1, &[1, 2, 3, 4][..])]);
        for length in 0..attribute.len() {
            assert_eq!(attributes(&attribute[..length]).count(), 0);
        }
        assert_eq!(attributes(&[0, 0, 0, 0, 0, 0, 0, 0]).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(messages(&[255; 64]).count(), 0);
    }

    #[test]
    fn requests_have_the_kernel_s_size() {
        let local = "10.0.0.1:80".parse().unwrap();
        assert_eq!(diag_request(local, local, &[0xff; 8]).len(), 56);
    }
}
