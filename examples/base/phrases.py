"""What customers say in other words: phrases of a kind that need no object, for `shop.py`. Knows
words alone.

Written for the base; no row of another example is drawn from here.
"""

from __future__ import annotations

PHRASES: dict[str, tuple[str, str]] = {
    "shipping": (
        "still waiting for my order|tracking has not moved|shipped to the wrong city|out for delivery since Monday|"
        "not home when he came|send it by air|next-day shipping|do you ship to Canada|can I collect it myself|"
        "which company ships it|dispatched yet|arrives before Friday|shipping costs|free shipping from what amount|"
        "split into two boxes|change the delivery address|deliver after six|leave it with the porter|stuck in customs|"
        "when is dispatch|has it left the warehouse|expected arrival date|late again|never arrived|lost in the post|"
        "signed for by a stranger|bring it upstairs|urgent, I need it tomorrow|hold my order for a week|"
        "ship everything together|same-day courier|weekend delivery|how fast can it be here|on the way for ten days|"
        "far from any town|no one called before coming|the driver was lost|sent back to the sender",
        "还在等货|物流信息不动了|寄错城市了|今天能发货吗|什么时候出库|能走空运吗|明天能到吗|寄到新疆吗|可以自提吗|"
        "用什么快递发|怎么还不发货|周五之前能到吗|邮费多少|满多少包邮|分成两件寄|改一下收货地址|晚上六点以后再送|放在传达室|"
        "卡在海关|预计到货时间|又晚了|一直没到|寄丢了|别人签收了|送货上楼吗|急用，请快点发|先不要发货，等一周|一起发货|"
        "当日达|节假日送货吗|最快几天到|在路上十天了|偏远地区|送之前没打电话|司机找不到路|被退回发件人|催一下快递|发什么物流",
    ),
    "defect": (
        "stopped working|came broken|cracked on arrival|scratched all over|a button is missing|does not switch on|"
        "falls off|full of holes|the wrong colour|smaller than it should be|not as described|smells of glue|"
        "makes a loud noise|overheats|leaks water|torn at the side|the lid does not close|dead on arrival|"
        "blurry display|no sound on one side|will not charge|peels off|rusty already|stained|missing parts|"
        "the manual is missing|loose threads|wobbles|bent|fake|poorly made|the paint comes off|shrank in the wash|"
        "pages are missing|past its date|mouldy|tastes stale|flickers|slow and freezes|the wrong model was in the box",
        "不工作了|到手就坏|裂开了|全是划痕|少了个扣子|开不了机|掉下来了|破了洞|颜色发错|尺码偏小|和描述不符|一股胶水味|声音很大|"
        "发烫|漏水|侧面撕破|盖子盖不上|收到就是坏的|屏幕模糊|没有声音|充不进电|掉皮|生锈了|有污点|缺零件|没有说明书|线头很多|"
        "摇晃|弯了|假货|做工差|掉漆|缩水|缺页|过期了|发霉|变味了|闪屏|很卡，死机|盒子里型号不对|质量太差|没用几天就坏了|断了",
    ),
    "money back": (
        "want my money back|refund please|returning this item|cancel my order|charged twice|paid too much|"
        "refund to another card|how do I return|no longer needed|changed my mind|send it back|return for free|"
        "price dropped yesterday|refund the difference|where is my refund|not refunded yet|only half was refunded|"
        "cancelled but still charged|the seller refuses a refund|how long do refunds take|return window|thirty days|"
        "does not fit, returning|swap it for another size|deposit back|compensation|reimburse me|money on my bank|"
        "return label|opened, can I still return it|gift return|partial refund|dispute the payment|ordered by mistake|"
        "undo the purchase|get the postage back|credited to my account|refund rejected|return without the box",
        "把钱退给我|申请退款|我要退货|取消订单|多扣了钱|付多了|退到别的卡|怎么退|用不上了|改变主意|寄回去|免费退货|昨天降价了|"
        "退差价|退款到哪了|还没退款|只退了一半|取消了还扣款|卖家不退钱|退款要几天|七天无理由|不合身，要退|换个尺码|退押金|赔偿|"
        "钱没回来|到账时间|退货单|拆封了能退吗|礼物能退吗|部分退款|申诉付款|拍错了|不想买了|退邮费|退回余额|退款被拒|没有盒子能退吗|"
        "重复付款|保价|退款进度",
    ),
    "login": (
        "cannot sign in|forgot my password|account locked|change my e-mail|delete my account|no code arrives|"
        "two-step verification|wrong user name|hacked|update my profile|new phone number|change my nickname|"
        "unsubscribe me|turn off notifications|automatic renewal|membership level|my points vanished|"
        "upload a profile picture|verify my identity|register again|link two accounts|session expired|"
        "logged out all the time|reset link does not work|who has access|privacy settings|change the language|"
        "remove my card|saved addresses|close my membership|the app forgets me|log in on two devices|sign-up fails|"
        "birthday is wrong|face recognition fails|export my data|my name is misspelled|invite code|parental control",
        "登录不了|密码忘了|账号冻结|换邮箱|注销账号|没有验证码|双重验证|用户名错误|被盗号|改资料|换手机号|改昵称|取消订阅|关闭通知|"
        "自动续费|会员等级|积分没了|上传头像|实名认证|重新注册|绑定账号|登录过期|总是退出登录|重置链接打不开|谁能看到|隐私设置|改语言|"
        "解绑银行卡|地址簿|退出会员|记不住我|两台设备登录|注册失败|生日填错|人脸识别失败|导出数据|名字写错|邀请码|家长控制|解锁|改密码",
    ),
    "bill": (
        "need an invoice|send me the receipt|tax number is wrong|company name on the bill|invoice by e-mail|"
        "paper invoice|PDF will not open|VAT shown|one invoice for all orders|invoice for last year|"
        "amount on the invoice is wrong|re-issue the invoice|for my accountant|tax office|itemised|how do I get a bill|"
        "billing address|invoice title|credit note|purchase order number|with stamp|for reimbursement|no receipt in the box|"
        "personal or company invoice|split the invoice|print it again|invoice language|when is it issued|"
        "net and tax separately|download the statement|proof of payment|expense report|receipt lost|in the name of my firm",
        "要开发票|发收据给我|税号错了|公司名称|电子发票|纸质发票|文件打不开|增值税|合并开票|去年的发票|发票金额不对|重开发票|给会计|"
        "税务局|明细|怎么开票|开票地址|发票抬头|红冲|订单号写上|盖章|报销用|盒子里没有小票|个人还是公司|分开开|再打印一份|英文发票|"
        "几天开出|税额分开|下载账单|付款凭证|报销单|收据丢了|开公司的|专用发票|普通发票|发票寄到哪|开票要多久|补开",
    ),
    "praise": (
        "love it|so happy|thank you|great work|five stars|will buy again|perfect|my kids adore it|recommended|"
        "better than expected|delighted|beautiful|excellent service|well packed|keep it up|worth every penny|"
        "friendly staff|made my day|top quality|could not be happier|best purchase this year|impressed|"
        "exactly what I wanted|a lovely gift|tastes wonderful|feels soft|works like a charm|superb|bravo|"
        "told my friends|second time I order|still like new|fantastic|quick and kind|my favourite shop|well done|"
        "big compliment|cosy|bright colours|grandma smiled",
        "太喜欢了|很开心|谢谢|干得好|五星|还会再买|完美|孩子很喜欢|推荐|比想的好|惊喜|漂亮|服务好|包装好|继续加油|物有所值|客服热情|"
        "心情都好了|品质一流|非常满意|今年最值|佩服|正是我要的|好礼物|味道好极了|手感好|好用极了|棒|点赞|告诉朋友|第二次买|像新的一样|"
        "太赞了|又快又好|最爱的店|给力|好评|舒服|颜色鲜艳|奶奶笑了|爱了|回购|贴心|用心",
    ),
}
